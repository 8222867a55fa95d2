"""The one error that a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used. Scripts print its message as one line and exit with code 2.

    The message names the value, says what is wrong with it and what would do instead.
    """
