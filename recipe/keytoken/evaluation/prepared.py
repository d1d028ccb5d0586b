"""What a prepared dataset says of the frames that it was made for."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from keytoken.data.contract import SamplingContract, preset_names
from keytoken.data.row_contract import require_contract
from keytoken.errors import ConfigurationError


def prepared_preset(files: Sequence[Path]) -> str | None:
    """The preset by which the vision tokens of all rows were counted; None if it is no preset, or several."""
    digests = set()
    for path in files:
        infos = pq.read_table(path, columns=["extra_info"])["extra_info"].to_pylist()
        digests |= {str((info or {}).get("sampling_digest")) for info in infos}
    names = {SamplingContract.preset(name).digest(): name for name in preset_names()}
    return names.get(digests.pop()) if len(digests) == 1 else None


def contradictions(files: Sequence[Path], contract: SamplingContract) -> str:
    """Where a row carries sampling settings of its own that are not the contract's; empty if none does."""
    try:
        for path in files:
            if "videos" in pq.read_schema(path).names:
                require_contract(
                    pq.read_table(path, columns=["videos"])["videos"].to_pylist(),
                    contract,
                    whose="the evaluation's",
                )
    except ConfigurationError as problem:
        return str(problem)
    return ""
