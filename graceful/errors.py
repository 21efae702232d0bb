"""One family of errors: what a user can mend.

A `GracefulError` says in one line what was being done, what was expected, what was found and what to do; the command
line prints that line and no traceback. Every other exception is a bug and keeps its traceback.
"""


class GracefulError(Exception):
    """Something that whoever runs this can mend; the message says how."""


class UnknownFormatError(GracefulError):
    """A stored record has a format version that this program does not know."""
