"""Whose clips are decoded when a dataset is opened: ``data.clip_check`` and ``data.clip_check_jobs``."""

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError

# Those that were not decoded when their vision tokens were counted; all; those whose rows have no count.
NEW, ALL, NONE = "new", "all", "none"
_POLICIES = (NEW, ALL, NONE)


def check_settings(policy: object, jobs: object) -> None:
    """Check both settings.

    Raises:
        ConfigurationError: An unknown policy, or jobs that are no number above 0 (None leaves it open).
    """
    if policy not in _POLICIES:
        name = unknown_name(f"data.clip_check={policy}", str(policy), _POLICIES, "values")
        raise ConfigurationError(name)
    if jobs is not None and (not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1):
        raise ConfigurationError(f"data.clip_check_jobs={jobs}: give a whole number above 0, or null")
