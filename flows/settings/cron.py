"""Checks a cron expression and a time zone when the configuration is read, instead of on the first night."""

import difflib
import re
import zoneinfo

from graceful.errors import UsageError

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...], int], ...] = (
    ("minute", 0, 59, (), 0),
    ("hour", 0, 23, (), 0),
    ("day of the month", 1, 31, (), 0),
    ("month", 1, 12, _MONTHS, 1),
    ("day of the week", 0, 7, _DAYS, 0),
)
_MACROS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")


def check_cron(expression: str) -> str:
    """Return a cron expression of five fields, or a macro such as @daily; raise UsageError naming the wrong field.

    >>> check_cron("*/15 8-18 * * mon-fri")
    '*/15 8-18 * * mon-fri'
    >>> check_cron("0 24 * * *")
    Traceback (most recent call last):
    graceful.errors.UsageError: cron: expected hour from 0 to 23, found '24'; "0 3 * * 1" is Monday at three
    """
    if expression in _MACROS:
        return expression
    parts = expression.split()
    example = '"0 3 * * 1" is Monday at three'
    if len(parts) != len(_FIELDS):
        raise UsageError(
            f"cron: expected five fields (minute, hour, day, month, weekday), found {len(parts)}; {example}"
        )
    for part, (name, low, high, words, first) in zip(parts, _FIELDS, strict=True):
        for item in part.split(","):
            if not _fits(item.lower(), low, high, {word: place + first for place, word in enumerate(words)}):
                raise UsageError(f"cron: expected {name} from {low} to {high}, found {item!r}; {example}")
    return expression


def check_timezone(name: str) -> str:
    """Return the name of a time zone; raise UsageError naming those that are like it."""
    try:
        zoneinfo.ZoneInfo(name)
        return name
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        known = sorted(zoneinfo.available_timezones())
    near = [zone for zone in known if zone.lower().rpartition("/")[2] == name.lower().replace(" ", "_")]
    near += difflib.get_close_matches(name, known, n=2)
    remedy = f"did you mean {near[0]!r}?" if near else "for instance 'Europe/Vienna' or 'UTC'"
    raise UsageError(f"timezone: expected a name of the IANA data base; {remedy}")


def _fits(item: str, low: int, high: int, words: dict[str, int]) -> bool:
    span, slash, step = item.partition("/")
    if slash and not (re.fullmatch(r"\d+", step) and 0 < int(step) <= high):
        return False
    if span == "*" or (span == "?" and high in (7, 31)):
        return True
    if span == "l" and high == 31:  # the last day of the month
        return not slash
    if high == 7:  # the second Friday, the last one
        span = re.sub(r"#[1-5]$|^l(?=[0-7a-z])", "", span)
    start, dash, end = span.partition("-")
    texts = [start, end] if dash else [start]  # 22-2 goes on after midnight
    values = [words.get(text, int(text) if re.fullmatch(r"\d+", text) else -1) for text in texts]
    return all(low <= value <= high for value in values)
