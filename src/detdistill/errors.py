"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input, told in one sentence: what was found, where, what was expected, what to do.

    The command line prints the sentence alone and exits with code 2; library callers catch it as a
    `ValueError`.
    """
