"""The sampling contract beside a run and in each of its checkpoints, and the comparison when a run resumes.

A checkpoint that goes on with other frames than it was trained on gives curves and scores that cannot be
compared, without any other sign. So a difference ends the start, before clips are read or a model is loaded.
"""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from keytoken.data.contract import CONTRACT_FILE, SamplingContract
from keytoken.errors import ConfigurationError
from keytoken.verl_adapter.dataset import sampling_contract
from keytoken.verl_adapter.whole_checkpoint import settle

logger = logging.getLogger(__name__)

_DEFAULT_PATCH_SIZE = 14  # verl's, for models without an image processor


def contract_of(config: DictConfig, processor: Any) -> SamplingContract:
    """The contract of a run, with the patch size that verl's dataset takes.

    Args:
        config: The whole configuration.
        processor: The model's processor, or None.
    """
    given = config.data.get("image_patch_size")
    patch_size = given or getattr(
        getattr(processor, "image_processor", None), "patch_size", _DEFAULT_PATCH_SIZE
    )
    return sampling_contract(config.data, patch_size)


def checkpoint_to_resume(trainer: DictConfig) -> Path | None:
    """The checkpoint folder that verl will resume from; None for a fresh start.

    With ``resume_mode=auto`` it is settled here, before verl looks (:func:`whole_checkpoint.settle`).

    Args:
        trainer: verl's block ``trainer``.
    """
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path":
        return Path(trainer.resume_from_path).absolute()
    return settle(Path(trainer.default_local_dir).absolute())


def require_same_contract(contract: SamplingContract, checkpoint: Path) -> None:
    """Compare a run's contract with that of the checkpoint it resumes from.

    Raises:
        ConfigurationError: they differ; names every field, the checkpoint and the remedy.
        DataError: the checkpoint's file was changed.
    """
    file = checkpoint / CONTRACT_FILE
    if not file.exists():
        logger.warning(
            "checkpoint %s has no %s: whether it was trained on the frames that this run reads is not known",
            checkpoint,
            CONTRACT_FILE,
        )
        return
    differences = contract.differences(SamplingContract.read(file), "in this run", "in the checkpoint")
    if differences:
        raise ConfigurationError(
            f"checkpoint {checkpoint} was trained on other frames: {'; '.join(differences)}. Set "
            "keytoken.sampling as in the checkpoint, or start anew with trainer.resume_mode=disable and "
            "another keytoken.run_dir."
        )


def write_contract(contract: SamplingContract, folder: Path) -> None:
    """Put the contract into the folder of a run or of a checkpoint, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    contract.write(folder / CONTRACT_FILE)
