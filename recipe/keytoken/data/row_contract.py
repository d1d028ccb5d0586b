"""Sampling settings that rows of a dataset carry, against the contract that their clips are read by."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from keytoken.data.contract import SamplingContract
from keytoken.errors import ConfigurationError


def require_contract(
    rows: Iterable[Iterable[Any] | None], contract: SamplingContract, whose: str = "the run's"
) -> None:
    """Refuse clips with sampling settings of their own that contradict the contract.

    Args:
        rows: The entries of ``videos`` of each row.
        contract: The contract.
        whose: Whose it is, for the message.

    Raises:
        ConfigurationError: names the clip, the setting and both values.
    """
    fields = asdict(contract)
    for videos in rows:
        for video in videos or ():
            if not isinstance(video, Mapping):
                continue
            for name, wanted in fields.items():
                given = video.get(name)
                if given is not None and given != wanted:
                    raise ConfigurationError(
                        f"clip {video['video']}: its row says {name}={given}, {whose} sampling contract "
                        f"{name}={wanted}; write the rows again or change the contract"
                    )
