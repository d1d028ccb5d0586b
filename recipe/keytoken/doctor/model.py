"""The model's folder: whether everything is there and whole, before any process loads it."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keytoken.data.families import MODEL_TYPES, require_one_look
from keytoken.doctor.finding import Finding, Subject, fail, of_error, ok, several, skip, warn
from keytoken.errors import ConfigurationError, DataError
from keytoken.resources import is_local_model

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_DOWNLOAD = "Copy or download the model again"


@dataclass(frozen=True, slots=True)
class Weights:
    """What the headers of a model's safetensors files say.

    Attributes:
        files: The files.
        num_parameters: Of all tensors together.
        num_bytes: The same in bytes.
    """

    files: list[Path]
    num_parameters: int
    num_bytes: int


def folder_of(subject: Subject) -> Path | None:
    """The model's folder on this machine: as given, or where a hub's download lies; None if nowhere."""
    path = subject.run.actor_rollout_ref.model.path
    if is_local_model(path):
        return Path(path).expanduser()
    return None if subject.short else _downloaded(path)


def _downloaded(name: str) -> Path | None:
    from transformers.utils import cached_file  # slow to import

    try:
        found = cached_file(name, "config.json", local_files_only=True)
    except (OSError, ValueError):  # not there; no name of a hub
        return None
    return Path(found).parent if found else None


def model_files(subject: Subject) -> Finding:
    """config.json, tokenizer, processor, and weights that are complete against their index and headers."""
    folder = folder_of(subject)
    if folder is None:
        name = subject.run.actor_rollout_ref.model.path
        if subject.short:
            return skip(f"{name} is a name of a hub")
        return warn(
            f"{name} is not on this machine",
            "It is downloaded when the run starts; download it before, or give the path of a folder.",
        )
    try:
        config = _read_json(folder / "config.json")
        family = config.get("model_type")
        if family not in MODEL_TYPES:
            return fail(
                f"{folder}: model_type is {family}, KeyToken trains {', '.join(MODEL_TYPES)}",
                "Choose such a model: policy=qwen2_5_vl_7b, policy=qwen3_vl_8b, or "
                "actor_rollout_ref.model.path=FOLDER.",
            )
        _require_text_side(folder)
        weights = read_weights(folder)
    except DataError as problem:
        return of_error(problem)
    if weights is None:
        return warn(
            f"{folder} has no safetensors files; weights of other kinds are not looked at",
            "Save the model by save_pretrained, which writes safetensors.",
        )
    return ok(
        f"{family}, {weights.num_parameters / 1e6:,.1f} million parameters, "
        f"{len(weights.files)} weight file{'s'[: len(weights.files) > 1]} complete, tokenizer, processor"
    )


def _require_text_side(folder: Path) -> None:
    """Tokenizer and processor files.

    Raises:
        DataError: names what is missing.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise DataError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy it from the "
            "model that this one was made from."
        )
    if not any((folder / name).is_file() for name in _PROCESSORS):
        raise DataError(
            f"{folder} has no processor ({', '.join(_PROCESSORS)}); copy it from the model that this one was "
            "made from."
        )
    for name in ("tokenizer.json", *_PROCESSORS):
        if (folder / name).is_file():
            _read_json(folder / name)


def read_weights(folder: Path) -> Weights | None:
    """Read the headers of all weight files, which takes milliseconds; None if there are no safetensors.

    Raises:
        DataError: a file is missing, cut short or no safetensors file, or lacks a tensor of the index.
    """
    if (folder / INDEX).is_file():
        placed = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed:
            raise DataError(f"{folder / INDEX} has no weight_map. {_DOWNLOAD}.")
        files = [folder / name for name in sorted(set(placed.values()))]
    elif (folder / WHOLE).is_file():
        placed, files = {}, [folder / WHOLE]
    elif any(folder.glob("*.bin")):
        return None
    else:
        raise DataError(f"{folder} has no weights ({WHOLE} or {INDEX}). {_DOWNLOAD}.")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(files)} weight files of {INDEX} are missing: "
            f"{several(missing)}. {_DOWNLOAD}."
        )
    headers = {file.name: _header(file) for file in files}
    lacking = [name for name, file in placed.items() if name not in headers[file]]
    if lacking:
        raise DataError(f"{folder}: {placed[lacking[0]]} has no tensor {lacking[0]}. {_DOWNLOAD}.")
    tensors = [tensor for header in headers.values() for tensor in header.values()]
    return Weights(files, sum(map(_count, tensors)), sum(_end(t) - t["data_offsets"][0] for t in tensors))


def _header(file: Path) -> dict[str, Any]:
    """Tensors of a safetensors file by name: 8 bytes of length, JSON, then the data, without gaps."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        size = file.stat().st_size
        if not 0 < length <= size - 8:
            raise DataError(f"{file} is no safetensors file, or is cut short ({size} bytes). {_DOWNLOAD}.")
        try:
            header = json.loads(stream.read(length))
        except ValueError as problem:
            raise DataError(f"{file} has a damaged header. {_DOWNLOAD}.") from problem
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    needed = 8 + length + max((_end(entry) for entry in tensors.values()), default=0)
    if size != needed:
        raise DataError(f"{file} has {size} bytes and should have {needed}: it is cut short. {_DOWNLOAD}.")
    return tensors


def _end(entry: dict[str, Any]) -> int:
    return int(entry["data_offsets"][1])


def _count(entry: dict[str, Any]) -> int:
    count = 1
    for edge in entry["shape"]:
        count *= edge
    return count


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise DataError(f"{file} does not exist. {_DOWNLOAD}.") from problem
    except ValueError as problem:
        raise DataError(f"{file} is no JSON ({problem}). {_DOWNLOAD}.") from problem
    if not isinstance(content, dict):
        raise DataError(f"{file} holds no mapping. {_DOWNLOAD}.")
    return content


def processor(subject: Subject) -> Finding:
    """Load tokenizer and processor as every worker does, and compare the vocabulary with the embeddings."""
    folder = folder_of(subject)
    if folder is None:
        return skip("the model is not on this machine")
    from transformers import AutoProcessor  # slow to import

    from keytoken.verl_adapter.stack import check_stack, check_vocabulary

    try:
        loaded = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError) as problem:
        return fail(
            f"the processor of {folder} cannot be loaded ({_first_line(problem)})",
            "Copy tokenizer and processor files from the model that this one was made from.",
        )
    try:
        check_vocabulary(str(folder))
        if subject.here:
            check_stack(subject.run)
    except ConfigurationError as problem:
        return of_error(problem)
    sides = ("tokenizer", "video_processor", "image_processor")
    lacking = [side for side in sides if not hasattr(loaded, side)]
    if lacking:
        return fail(
            f"{type(loaded).__name__} of {folder} has no {' and no '.join(lacking)}",
            "Copy the processor files from the model that this one was made from.",
        )
    try:
        require_one_look(loaded)
    except ConfigurationError as problem:
        return of_error(problem)
    return ok(f"{type(loaded).__name__}, {len(loaded.tokenizer):,} tokens, one for each embedding")


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)[:200]


def num_parameters(subject: Subject) -> int | None:
    """The model's parameters, if its files say; a damaged file is the matter of another check."""
    folder = folder_of(subject)
    try:
        weights = read_weights(folder) if folder else None
    except DataError:
        return None
    return weights.num_parameters if weights else None
