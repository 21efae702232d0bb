"""Prints a canary: who is watched, what was compared, and how it ended."""

from typing import Any

from rich.console import Console

_KINDS = {
    "canary": "answers {share:.1%} of the image queries; {reference} is asked beside",
    "shadow": "is asked beside for {share:.1%} of the image queries; {reference} answers",
    "probation": "serves; {reference}, whose place it took, is asked beside for {share:.1%} of the image queries",
}


def print_canary(console: Console, found: dict[str, Any]) -> None:
    """One canary, a fact a line."""
    lines = [f"Canary {found['number']}: {found['candidate']} {_KINDS[found['kind']].format(**found)}"]
    lines.append(
        f"watched: {found['watched_hours']:.2f} of {found['hours']:g} hours, by {found['processes']} processes"
    )
    if found["compared"]:
        lines.append(
            f"changed first answers: {found['changed_share']:.1%} of {found['compared']:,} pictures, "
            f"{found['changed_lower']:.1%} to {found['changed_upper']:.1%} (at every moment); limit "
            f"{found['max_changed']:.1%}"
        )
        lines.append(f"items in common: {found['overlap']:.1%}")
    else:
        lines.append(f"changed first answers: none compared yet; limit {found['max_changed']:.1%}")
    if found["measured"] is not None:
        lines.append(f"measured by its evaluation: {found['measured']:.1%}")
    lines.append(
        f"failed or late: {found['failed']:,} of {found['attempted']:,}, at least {found['failed_lower']:.1%}; limit "
        f"{found['max_failed']:.1%}"
    )
    if found["labelled"]:
        limit = "none" if found["max_nfr"] is None else f"{found['max_nfr']:.1%}"
        lines.append(
            f"negative flips: {found['nfr']:.1%} of {found['labelled']:,} labelled pictures, {found['nfr_lower']:.1%} "
            f"to {found['nfr_upper']:.1%} (at every moment); limit {limit}; positive flips: {found['positive_flips']:,}"
        )
    lines.append(f"not compared: {found['dropped']:,} for want of room, {found['repeated']:,} seen before")
    if found["vectors"]:
        lines.append(
            f"not watched: {found['vectors']:,} searches by a vector, which no other generation can answer; send the "
            "picture"
        )
    if found["ended"] is not None:
        lines.append(f"ended ({found['ended']['outcome']}): {found['ended']['reason']}")
        lines += [found["ended"]["move"]] if found["ended"]["move"] else []
    for number, line in enumerate(lines):
        console.print(("  " if number else "") + line, highlight=False, markup=False, soft_wrap=True)
