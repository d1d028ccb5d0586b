"""What a configuration asks of the place where it runs: slots, files, and whether that is this machine."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from keytoken.attribution.methods import needs_passes
from keytoken.errors import ConfigurationError
from keytoken.schema import MethodConfig

# Keys whose value is a file or folder that every node opens by that name: what a run reads ...
INPUTS = (
    "data.train_files",
    "data.val_files",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.model.tokenizer_path",
    "reward.custom_reward_function.path",
)
# ... and what it makes.
OUTPUTS = (
    "keytoken.run_dir",
    "data.quarantine_file",
    "data.frame_cache",
    "trainer.default_local_dir",
    "trainer.validation_data_dir",
    "trainer.rollout_data_dir",
)


def validate_files(config: DictConfig) -> None:
    """Check that the local files which the configuration names exist; for a run on this machine.

    Raises:
        ConfigurationError: names the key, the path and the remedy.
    """
    for key in ("data.train_files", "data.val_files"):
        value = OmegaConf.select(config, key)
        for path in [value] if isinstance(value, str) else value or []:
            if "://" not in path and not Path(path).expanduser().exists():
                raise ConfigurationError(f"{key}: {path} does not exist on this machine; {_demo_hint(path)}.")
    path = config.actor_rollout_ref.model.path
    if is_local_model(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigurationError(
            f"actor_rollout_ref.model.path: {path} holds no model (no config.json); {_demo_hint(path)}."
        )


def require_absolute(config: DictConfig) -> None:
    """Refuse paths that mean something else on another machine; for a run that is submitted from this one.

    Whether the files exist is asked on the cluster, when the run starts
    (:mod:`keytoken.verl_adapter.shared_files`): this machine may have none of them.

    Raises:
        ConfigurationError: names the key, the path and what to write.
    """
    for key, path in paths_of(config, (*INPUTS, *OUTPUTS)):
        if not Path(path).is_absolute():
            absolute = Path(path).expanduser().absolute()
            raise ConfigurationError(
                f"{key}={path} is no absolute path, and the job runs in another folder on other machines; "
                f"give the path by which all nodes of the cluster see it (here it would be {absolute})."
            )


def paths_of(config: DictConfig, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys with the paths that they name; what comes from a hub or a package is no path."""
    for key in keys:
        value = OmegaConf.select(config, key)
        for path in [value] if isinstance(value, str) else value or []:
            of_a_hub = key.startswith("actor_rollout_ref.model.") and not is_local_model(path)
            if "://" not in path and not of_a_hub:
                yield key, path


def is_local_model(path: str) -> bool:
    """Whether a model's path is one of this machine; "name" and "owner/name" are otherwise a hub's."""
    if Path(path).expanduser().is_dir():
        return True
    return not ("://" in path or re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path))


def _demo_hint(path: str) -> str:
    demo = os.environ.get("KEYTOKEN_DEMO_DIR")
    if demo and path.startswith(demo):
        return "run `keytoken demo --prepare-only`, and set KEYTOKEN_DEMO_DIR to the folder that it prints"
    return "give the path of one that does"


def runs_here(config: DictConfig) -> bool:
    """Whether the run starts its own Ray on this machine, and does not join a cluster."""
    address = os.environ.get("RAY_ADDRESS") or config.ray_kwargs.ray_init.get("address")
    return address in (None, "", "local")


def slots_of(config: DictConfig) -> dict[str, int]:
    """GPUs (logical slots on a CPU) that each pool of a run asks for, by its name in ``keytoken.cluster``."""
    slots = {"actor": int(config.trainer.nnodes * config.trainer.n_gpus_per_node)}
    rollout = config.actor_rollout_ref.rollout
    if not config.actor_rollout_ref.hybrid_engine:
        slots["rollout"] = int(rollout.nnodes * rollout.n_gpus_per_node)
    if config.keytoken.attribution.placement == "pool" and needs_attribution(config):
        slots["attribution"] = int(config.keytoken.attribution.num_workers)
    return slots


def num_slots(config: DictConfig) -> int:
    """GPUs (logical slots on a CPU) that all pools of a run ask for together."""
    return sum(slots_of(config).values())


def needs_attribution(config: DictConfig) -> bool:
    """Whether the run's method needs the passes of an attribution group."""
    method = OmegaConf.to_container(config.keytoken.method, resolve=True)
    return needs_passes(MethodConfig.from_mapping(method))  # type: ignore[arg-type]
