"""What an error says of the errors that it came from."""

import errno

import pytest

from graceful.errors import is_disk_full


def test_a_full_disk_is_found_among_the_causes():
    error = ValueError("writing failed")
    error.__cause__ = RuntimeError("a library's own")
    error.__cause__.__context__ = OSError(errno.ENOSPC, "anything")
    assert is_disk_full(error)


@pytest.mark.timeout(5)
def test_causes_that_go_in_a_circle_end():
    error, other = ValueError("first"), RuntimeError("second")
    error.__context__, other.__context__ = other, error
    assert not is_disk_full(error)
