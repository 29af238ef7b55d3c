"""Errors that end a command with one clear line and a documented exit code.

Every message says what is wrong, where, and what to do. Anything that is not a `NegrecError` is a
bug and shows its traceback.
"""


class NegrecError(Exception):
    """Base of all expected failures; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(NegrecError):
    """A wrong key, value, mapping or command-line argument."""

    exit_code = 2


class InputError(NegrecError):
    """Input data that cannot be used: too many malformed rows, an unreadable file, a bad schema."""

    exit_code = 3


class MissingError(NegrecError):
    """A partition, label, model or program that is needed and is not there."""

    exit_code = 4


class ConflictError(NegrecError):
    """Another writer committed the same partition first."""

    exit_code = 5


class ArtefactError(NegrecError):
    """A model directory that is incomplete, altered, or made for another codebook."""

    exit_code = 6


class GateError(NegrecError):
    """A check before publishing failed; the list published before stays in place."""

    exit_code = 7
