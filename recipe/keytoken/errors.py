"""The error tree.

Every error that a user can cause derives from :class:`KeyTokenError` and from the standard class it
stands in for, so both ``except KeyTokenError`` and ``except ValueError`` work. All of them carry plain
strings only and therefore survive pickling between Ray processes. Messages name the thing, the place
and the remedy.
"""


class KeyTokenError(Exception):
    """Root of all errors raised by KeyToken.

    Attributes:
        exit_code: Of a command that ends with the error: 2 for what its user has to mend, 3 for what may pass
            when the same command is given again.
    """

    exit_code = 2


class ConfigurationError(KeyTokenError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""


class DataError(KeyTokenError, ValueError):
    """A dataset row, clip or file that cannot be used as it is."""


class ClipError(DataError):
    """A clip that is missing, empty, truncated or cannot be decoded."""


class InertViewError(KeyTokenError, RuntimeError):
    """A counterfactual pass whose input did not differ from the real one."""


class NonFiniteError(KeyTokenError, FloatingPointError):
    """A NaN or an infinity where a log-prob, an entropy or an advantage was expected."""


class KernelError(KeyTokenError, ArithmeticError):
    """A kernel whose result is not what it has to be."""


class VersionError(KeyTokenError, ImportError):
    """An installed package has a version that KeyToken was not written for."""


class ClusterError(KeyTokenError, RuntimeError):
    """The machine or cluster cannot hold the run: GPUs, ports, shared memory."""

    exit_code = 3


class WeightSyncError(KeyTokenError, RuntimeError):
    """A weight broadcast that did not end in time or left groups with unequal weights."""

    exit_code = 3


class CheckpointError(KeyTokenError, OSError):
    """A checkpoint for which the disk has no room."""


class StoppedError(KeyTokenError, RuntimeError):
    """A run that ended early because it was told to, with its last step saved."""

    exit_code = 128 + 15  # what a shell reports of a program that SIGTERM ended


class DoctorError(KeyTokenError, RuntimeError):
    """Something that a check before a run found, and that would keep the run from working."""


class ParityError(KeyTokenError, RuntimeError):
    """Engine, actor and attribution group that do not see the same prompt, or score an answer differently."""
