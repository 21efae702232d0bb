"""One family of errors: what a user can mend.

A `GracefulError` says in one line what was being done, what was expected, what was found and what to do; the command
line prints that line and no traceback. Every other exception is a bug and keeps its traceback.
"""

import errno
import re
from collections.abc import Iterator

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NO_ROOM = ("no space left on device", "os error 28", "disk quota exceeded", "os error 122", "storagefull")


class GracefulError(Exception):
    """Something that whoever runs this can mend; the message says how. `exit_code`: of the command line."""

    exit_code = 1


class UnknownFormatError(GracefulError):
    """A stored record has a format version that this program does not know."""


class UsageError(GracefulError, ValueError):
    """A value that was given cannot be used; the message says what was expected."""


class StorageError(GracefulError):
    """The storage refused to read or write; nothing is known to be damaged."""


def in_one_line(error: BaseException, limit: int = 160) -> str:
    """What a library said, on one line, without the colours and arrows of a terminal."""
    text = _COLOURS.sub("", str(error)).replace("\u21b3", ":")
    return " ".join(text.split()).replace(" : ", ": ")[:limit] or type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that it came from, is that of a full disk or a spent quota."""
    return any(
        (isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(words in str(found).lower() for words in _NO_ROOM)
        for found in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # whoever raises an old exception again may close a circle
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
