"""The error tree.

Every error that a user can cause derives from :class:`KeyTokenError` and from the standard class it
stands in for, so both ``except KeyTokenError`` and ``except ValueError`` work. All of them carry plain
strings only and therefore survive pickling between Ray processes. Messages name the thing, the place
and the remedy.
"""


class KeyTokenError(Exception):
    """Root of all errors raised by KeyToken."""


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


class WeightSyncError(KeyTokenError, RuntimeError):
    """A weight broadcast that did not end in time or left groups with unequal weights."""


class DoctorError(KeyTokenError, RuntimeError):
    """Something that a check before a run found, and that would keep the run from working."""
