"""Errors that a user can mend. They end a program with exit status 2, before any work is lost."""


class ConfigError(ValueError):
    """The configuration cannot be used. The message names field, value and what would work."""


class DataError(ValueError):
    """The data cannot be used. The message names file, value and what would work."""
