"""What a request is refused with; commands print the message and exit with code 2."""


class UserError(Exception):
    """The request cannot be met; the message names the remedy. Commands exit with code 2."""


class NotInProfileError(UserError):
    """What was asked for belongs to other profiles; a notebook that ends with it is done."""


class ConfigError(UserError, ValueError):
    """An unknown profile or option, or a value of the wrong type or out of bounds."""
