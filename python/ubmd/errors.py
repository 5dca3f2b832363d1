"""Errors that a user can act on."""


class UbmdError(Exception):
    """Base of all errors with a message meant for the user: one clear sentence that says what to do.

    The command line prints the message without a traceback and exits with status 1.
    """


class DataError(UbmdError):
    """Structures or labels are missing, malformed, not finite, or in the wrong units."""


class SettingsError(UbmdError):
    """A settings file has an unknown key, a wrong type or a value outside its range."""


class ModelError(UbmdError):
    """A model file is missing, corrupt, of another format, or lacks what was asked of it."""


class LabelError(UbmdError):
    """A reference calculation failed, did not converge, or returned an absurd label."""


class SimulationError(UbmdError):
    """LAMMPS could not be started or an MD run ended with an error."""


class TrainingError(UbmdError):
    """A training diverged, or a checkpoint belongs to another training."""


class StorageError(UbmdError):
    """A disk, a quota or a limit on file sizes is full: nothing is lost; with space, the same command goes on."""
