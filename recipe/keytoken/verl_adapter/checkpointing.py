"""verl's checkpoints, with the sampling contract inside, each complete or not there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from keytoken.data.contract import SamplingContract
from keytoken.errors import ClusterError
from keytoken.schema import KeyTokenConfig
from keytoken.verl_adapter import contract_file
from keytoken.verl_adapter.bounded import bounded
from keytoken.verl_adapter.compat import CheckpointCallback
from keytoken.verl_adapter.whole_checkpoint import require_room, save_whole

if TYPE_CHECKING:
    from keytoken.verl_adapter.compat import PPOTrainer as _Trainer
else:
    _Trainer = object  # a mixin: which of verl's trainers comes next is the subclass's choice


class Checkpointing(_Trainer):
    """How a run begins from a checkpoint and how it writes one."""

    keytoken: KeyTokenConfig
    config: DictConfig
    contract: SamplingContract
    checkpoint_callback: Any = CheckpointCallback()

    def _init_tokenizer(self) -> None:
        """The contract needs the processor's patch size and nothing that comes later: compare it first."""
        super()._init_tokenizer()
        trainer = self.config.trainer
        self.contract = contract_file.contract_of(self.config, self.processor)
        checkpoint = contract_file.checkpoint_to_resume(trainer)
        if checkpoint is not None:
            contract_file.require_same_contract(self.contract, checkpoint)
        contract_file.write_contract(self.contract, Path(self.keytoken.run_dir))
        if trainer.get("save_freq", -1) > 0:
            require_room(Path(trainer.default_local_dir))

    def _save_checkpoint(self) -> None:
        """verl's, into a folder aside; here and not there older ones go, once the new one is in its place."""
        folder, step = Path(self.config.trainer.default_local_dir), self.global_steps
        trainer, verls_save, callback = (
            self.config.trainer,
            super()._save_checkpoint,
            self.checkpoint_callback,
        )
        keep = 1 if trainer.get("remove_previous_ckpt_in_save") else trainer.get("max_actor_ckpt_to_keep")

        def write(aside: Path) -> None:
            contract_file.write_contract(self.contract, aside / f"global_step_{step}")
            trainer.default_local_dir, self.checkpoint_callback = str(aside), CheckpointCallback()
            try:
                verls_save()
            finally:
                trainer.default_local_dir, self.checkpoint_callback = str(folder), callback

        bounded(
            lambda: save_whole(folder, step, write, keep),
            self.keytoken.save_timeout_s,
            f"Saving the checkpoint of step {step} to {folder}",
            "Its disk is slow or cannot be reached; raise keytoken.save_timeout_s for a very large model.",
            ClusterError,
        )
        place = str(folder / f"global_step_{step}")
        callback.on_save(trainer=self, global_step=step, checkpoint_dir=place, async_save=False)
