"""The one exception that users see."""


class InputError(Exception):
    """Bad input, in one line that names the file, row or option and the remedy."""
