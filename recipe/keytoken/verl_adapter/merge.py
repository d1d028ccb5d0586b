"""From a checkpoint of a training run to a Hugging Face folder that any engine loads.

verl saves what each rank holds (``model_world_size_W_rank_R.pt``) and beside it the model's configuration,
tokenizer and processor (``huggingface``). verl has a tool for joining them, ``python -m verl.model_merger
merge``, which rounds every weight to bfloat16 (verl 0.9.1, model_merger/fsdp_model_merger.py:184-196). Here
weights get the dtype that the model's configuration names, which is what a rollout engine has them in.

Only FSDP over one axis is joined here; for anything else the error names verl's command.
"""

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from keytoken.data.contract import CONTRACT_FILE
from keytoken.errors import ConfigurationError, DataError

MERGED = "merged"
_STEP = re.compile(r"global_step_(\d+)")


def model_folder(path: Path) -> Path:
    """The Hugging Face folder that a user means: the folder itself, or a checkpoint's, joined if need be.

    Args:
        path: A Hugging Face folder, a run folder, its ``checkpoints``, a ``global_step_N`` or its ``actor``;
            of several checkpoints the last one is taken.

    Returns:
        The folder; for a checkpoint ``global_step_N/merged``, which is made once.

    Raises:
        ConfigurationError: there is no model here, or one that cannot be joined here.
    """
    if (path / "config.json").is_file():
        return path
    actor = _actor_folder(path)
    target = actor.parent / MERGED
    if not (target / "config.json").is_file():
        merge(actor, target)
    return target


def merge(actor: Path, target: Path) -> None:
    """Join the shards of a checkpoint; the folder appears when it is complete.

    Raises:
        ConfigurationError: the weights are distributed in a way that is not joined here.
        DataError: a shard is missing.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    hugging_face = actor / "huggingface"
    config = AutoConfig.from_pretrained(hugging_face)
    weights = _joined(actor, config.dtype or torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(hugging_face, partial)
    model.save_pretrained(partial, state_dict=weights)
    contract = actor.parent / CONTRACT_FILE
    if contract.is_file():  # so that the folder still says what it was trained on when it is moved
        shutil.copy(contract, partial)
    partial.rename(target)


def _actor_folder(path: Path) -> Path:
    """Where a checkpoint's shards lie."""
    steps = [(int(found[1]), folder) for folder, found in _checkpoints(path)]
    candidates = [path, path / "actor", *(folder / "actor" for _, folder in sorted(steps, reverse=True))]
    for folder in candidates:
        if (folder / "fsdp_config.json").is_file():
            return folder
    raise ConfigurationError(
        f"model={path}: neither a Hugging Face folder (with config.json) nor a checkpoint or run folder of "
        "keytoken train (with checkpoints/global_step_N/actor); check the path"
    )


def _checkpoints(path: Path) -> list[tuple[Path, re.Match[str]]]:
    folders = [*path.glob("global_step_*"), *path.glob("checkpoints/global_step_*")]
    return [(folder, found) for folder in folders if (found := _STEP.fullmatch(folder.name))]


def _joined(actor: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    world_size = int(json.loads((actor / "fsdp_config.json").read_text(encoding="utf-8"))["world_size"])
    shards = [_load(actor / f"model_world_size_{world_size}_rank_{rank}.pt") for rank in range(world_size)]
    weights = {}
    for name in sorted(shards[0]):
        pieces = [shard.pop(name) for shard in shards]  # lets go of what has been joined
        weights[name] = _join(name, pieces, actor).to(dtype)
    return weights


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path}: this shard of the checkpoint is missing; copy all files of the folder")
    # A file that asks for other classes than those of tensors is refused: loading it could run any program.
    try:
        shard: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as problem:
        reason = next(
            (line.strip() for line in str(problem).splitlines() if "GLOBAL" in line), "not only tensors"
        )
        raise DataError(
            f"{path}: this is no shard of a model that can be loaded safely ({reason})"
        ) from problem
    return shard


def _join(name: str, pieces: list[Any], actor: Path) -> Tensor:
    first = pieces[0]
    if not isinstance(first, DTensor):
        return first
    placements = first.placements
    if len(placements) == 1 and isinstance(placements[0], Shard):
        return torch.cat([piece._local_tensor for piece in pieces], dim=placements[0].dim)
    if all(isinstance(placement, Replicate) for placement in placements):
        return first._local_tensor
    raise ConfigurationError(
        f"{actor}: {name} is distributed as {placements}, which is not joined here. Join it by verl, `python "
        f"-m verl.model_merger merge --backend fsdp --local_dir {actor} --target_dir FOLDER`, copy "
        f"{actor.parent / CONTRACT_FILE} into it, then give model=FOLDER"
    )
