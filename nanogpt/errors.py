"""Errors that the user can mend, told apart from bugs.

A `UserError` carries one finished message: what is wrong, the value seen, what to do. The command line prints it
without a traceback and exits with `exit_code`. Every other exception is a bug and keeps its traceback.
"""


class UserError(Exception):
    """Something that the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError):
    """A data set that is missing, damaged or does not fit the model."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is missing, damaged or does not fit."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was once written: cut off, or with flipped bits."""


class DivergedError(UserError):
    """Training has diverged: too many steps in a row without a finite loss and gradient."""

    exit_code = 3
