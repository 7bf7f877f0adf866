"""What a person can do wrong, told apart from what we did wrong.

A `UserError` carries one finished message: what is wrong, the value seen, what to do. The command line
prints it without a traceback and exits with 2. Every other exception is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Something that the person at the keyboard can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError):
    """A data set that is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is missing, damaged or does not fit."""


class DivergedError(UserError):
    """Training has left the numbers behind: a loss that is not finite."""

    exit_code = 3
