"""Which frames an evaluated model sees: those it was trained on, unless the user says otherwise.

``keytoken train`` leaves its sampling contract in every run and checkpoint. An evaluation by another one
measures the change of frames as well, without any other sign of it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from keytoken.data.contract import CONTRACT_FILE, SamplingContract
from keytoken.data.families import patch_size_of
from keytoken.data.sampling_words import named_contract
from keytoken.errors import ConfigurationError
from keytoken.evaluation.options import EvaluateOptions
from keytoken.evaluation.prepared import contradictions, prepared_preset


@dataclass(frozen=True, slots=True)
class Frames:
    """The contract of an evaluation.

    Attributes:
        contract: The contract.
        origin: Where it comes from, for people.
        differences: What distinguishes it from the checkpoint's; empty if nothing does, or nothing is known.
    """

    contract: SamplingContract
    origin: str
    differences: tuple[str, ...] = ()


def frames_of(options: EvaluateOptions, usual: str, model: Path, prepared: Sequence[Path] = ()) -> Frames:
    """The contract that is asked for, or the checkpoint's, the dataset's, or the benchmark's usual one.

    Args:
        options: What to evaluate.
        usual: The benchmark's preset.
        model: Hugging Face folder of the model, that of a checkpoint if it is one.
        prepared: The questions' files, if they are prepared datasets.

    Raises:
        ConfigurationError: It is not that of the checkpoint, or not that of rows which carry settings of
            their own, and ``sampling_mismatch`` is not "allow"; names every difference.
        DataError: The checkpoint's file was changed.
    """
    frames = _frames_of(options, usual, model, prepared)
    odd = contradictions(prepared, frames.contract)
    if not odd:
        return frames
    if options.sampling_mismatch != "allow":
        raise ConfigurationError(f"{odd}. Or add sampling_mismatch=allow, which the report then says")
    return replace(frames, differences=(*frames.differences, odd))


def _frames_of(options: EvaluateOptions, usual: str, model: Path, prepared: Sequence[Path]) -> Frames:
    file = _trained_by(model)
    trained = None if file is None else SamplingContract.read(file)
    made_for = prepared_preset(prepared)
    why = f"usual for {options.benchmark}" if made_for is None else "by which the questions were prepared"
    usual = made_for or usual
    own = Frames(_fitted(SamplingContract.preset(usual), model), f"preset {usual}, {why}")
    if trained is not None:
        own = Frames(trained, f"as trained, {file}")
    if options.sampling is None:
        return own
    contract = _fitted(named_contract(options.sampling, own.contract), model)
    origin = (
        f"sampling={options.sampling}" if options.sampling[0] != "," else f"{own.origin}{options.sampling}"
    )
    differences = [] if trained is None else contract.differences(trained, "asked for", "in training")
    if differences and options.sampling_mismatch != "allow":
        raise ConfigurationError(
            f"model={options.model} was trained on other frames than sampling={options.sampling} gives it: "
            f"{'; '.join(differences)} ({file}). Leave sampling= out to show it what it was trained on, or "
            "add sampling_mismatch=allow, which the report then says."
        )
    return Frames(contract, origin, tuple(differences))


def _fitted(contract: SamplingContract, model: Path) -> SamplingContract:
    """A contract with the model's patches, where it has those that nobody asked for, as all presets do."""
    patch_size = patch_size_of(model)
    if patch_size is None or contract.patch_size != SamplingContract.patch_size:
        return contract
    return replace(contract, patch_size=patch_size)


def _trained_by(model: Path) -> Path | None:
    """The contract beside a model, or that of the checkpoint in whose folder it lies."""
    step = (folder for folder in model.absolute().parents if re.fullmatch(r"global_step_\d+", folder.name))
    files = [folder / CONTRACT_FILE for folder in (model, *step)]
    return next((file for file in files if file.is_file()), None)
