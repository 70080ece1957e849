"""The one exception that a user is meant to read, and the one warning."""


class UserError(ValueError):
    """Bad input, told in one sentence: what was found, where, what was expected, what to do.

    The command line prints the sentence alone and exits with code 2; library callers catch it as a
    `ValueError`.
    """


class UserNotice(UserWarning):
    """What was done otherwise than a user may think, told in one sentence."""
