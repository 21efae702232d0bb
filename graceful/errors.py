"""One family of errors: what a user can mend.

A `GracefulError` says in one line what was being done, what was expected, what was found and what to do; the command
line prints that line and no traceback. Every other exception is a bug and keeps its traceback.
"""


class GracefulError(Exception):
    """Something that whoever runs this can mend; the message says how. `exit_code`: of the command line."""

    exit_code = 1


class UnknownFormatError(GracefulError):
    """A stored record has a format version that this program does not know."""


class UsageError(GracefulError, ValueError):
    """A value that was given cannot be used; the message says what was expected."""
