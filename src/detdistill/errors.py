"""The one exception that a user is meant to read, the one warning, and which process tells them."""

import os


class UserError(ValueError):
    """Bad input, told in one sentence: what was found, where, what was expected, what to do.

    The command line prints the sentence alone and exits with code 2; library callers catch it as a
    `ValueError`.

    Attributes:
        told: in a run of several processes, whether another has told what is wrong; None where
            all of them find the same, which the first tells.
    """

    told: bool | None = None


class DivergedError(UserError):
    """A training whose loss or weights are no longer finite."""


class UserNotice(UserWarning):
    """What was done otherwise than a user may think, told in one sentence."""


def is_first_here() -> bool:
    """Whether this is the first process of its machine, which tells what is wrong there."""
    return os.environ.get("LOCAL_RANK", "0") in ("", "0")


def tells(error: UserError) -> bool:
    """Whether it is this process that tells an error."""
    return is_first_here() if error.told is None else not error.told
