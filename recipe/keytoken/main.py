"""The training job: compose the configuration, check it whole, run it."""

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from keytoken.cluster_config import DATA_TIMEOUT_VARIABLE
from keytoken.compose import compose_config
from keytoken.errors import ConfigurationError
from keytoken.progress import progress_bar
from keytoken.resources import OUTPUTS, num_slots, runs_here, validate_files
from keytoken.validate import validate_run
from keytoken.verl_adapter.machine import stay_on_loopback

# verl reserves up to ten logical CPUs for a slot (single_controller/ray/base.py:119), besides its services.
LOGICAL_CPUS_PER_SLOT = 16
EXTERNAL_MODULE = "keytoken.verl_adapter.register"
# Libraries that tell their makers of every use, which is nobody's business, and for which a run waits where a
# network drops what would leave it: 10 s for each data file. Who wants to tell sets the variable.
_SILENT = {"HF_UPDATE_DOWNLOAD_COUNTS": "0", "VLLM_NO_USAGE_STATS": "1"}


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose ``train.yaml`` with overrides, validate it, and fill in what follows from other keys.

    Args:
        overrides: hydra overrides, such as ``experiment=demo_cpu`` or ``trainer.save_freq=10``.

    Returns:
        The resolved configuration: plain values, nothing left to interpolate.

    Raises:
        ConfigurationError: an unknown key or group, a value out of range, or keys that exclude each other.
    """
    config = compose_config(overrides)
    validate_run(config)
    _derive(config)
    return config


def train(overrides: Sequence[str]) -> Path:
    """Run a training job to its end and return its run folder.

    Raises:
        KeyTokenError: what the user can mend: the configuration, files, versions or the machine. The doctor
            looks at the machine, the model, the data and the reward first (``keytoken.doctor``).
    """
    config = load_config(overrides)
    if runs_here(config):
        validate_files(config)
    run_dir = Path(config.keytoken.run_dir)
    _make_run_dir(run_dir)
    if config.keytoken.doctor == "short":
        from keytoken.doctor.run import require_healthy  # what only composes a configuration needs none of it

        require_healthy(config, run_dir / "doctor.json")
    OmegaConf.save(config, run_dir / "config.yaml")
    metrics = _fresh_metrics_file(run_dir)
    _set_environment(config, {**_of_this_run(config, metrics), **_tracker_folder(config, run_dir)})
    if runs_here(config):
        stay_on_loopback()

    with warnings.catch_warnings():
        # verl lists every training engine it could have used but for a missing package.
        warnings.filterwarnings("ignore", message=".* engine is not available", category=UserWarning)
        from keytoken.verl_adapter.task_runner import run  # slow: imports verl, Ray and vLLM

    with progress_bar(metrics, config.trainer.total_training_steps):
        run(config)
    return run_dir


def _derive(config: DictConfig) -> None:
    """Values that follow from others and so have no key of their own."""
    with open_dict(config):
        for key in OUTPUTS:  # workers on other nodes have other working directories
            path = OmegaConf.select(config, key)
            if path:
                OmegaConf.update(config, key, str(Path(path).expanduser().absolute()))
        if config.trainer.device == "cpu" and runs_here(config):
            slots = num_slots(config)
            config.ray_kwargs.ray_init.num_gpus = slots
            config.ray_kwargs.ray_init.num_cpus = LOGICAL_CPUS_PER_SLOT * slots


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigurationError(
            f"keytoken.run_dir={run_dir} cannot be made ({problem.strerror}); name a folder that can be "
            "written."
        ) from problem


def _set_environment(config: DictConfig, extra: dict[str, str]) -> None:
    """Put variables where this process and every Ray worker, local or remote, will find them."""
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    if EXTERNAL_MODULE not in modules:
        modules.append(EXTERNAL_MODULE)
    variables = {"VERL_USE_EXTERNAL_MODULES": ",".join(modules), **extra}
    with open_dict(config):
        runtime: Any = config.ray_kwargs.ray_init.setdefault("runtime_env", {})
        environment = runtime.setdefault("env_vars", {})
        for name, value in variables.items():
            environment[name] = value
        for name, value in _SILENT.items():
            environment.setdefault(name, os.environ.get(name, value))
    os.environ.update({name: str(value) for name, value in environment.items()})
    # A submitted job's own environment may set the same variables, here and where verl hands some on. Ray
    # takes none twice, and its refusal prints them all with their values.
    os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"


def _of_this_run(config: DictConfig, metrics: Path) -> dict[str, str]:
    limit_s = config.keytoken.cluster.data_timeout_s
    return {"VERL_FILE_LOGGER_PATH": str(metrics), DATA_TIMEOUT_VARIABLE: str(limit_s)}


def _tracker_folder(config: DictConfig, run_dir: Path) -> dict[str, str]:
    """TensorBoard's events lie in the run folder too, unless their folder is named."""
    wanted = "tensorboard" in config.trainer.logger and "TENSORBOARD_DIR" not in os.environ
    return {"TENSORBOARD_DIR": str(run_dir / "tensorboard")} if wanted else {}


def _fresh_metrics_file(run_dir: Path) -> Path:
    """``metrics.jsonl``; an earlier one is kept under the next number, because verl truncates the file."""
    current = run_dir / "metrics.jsonl"
    if current.exists():
        names = (path.name.split(".")[1] for path in run_dir.glob("metrics.*.jsonl"))
        number = max((int(name) for name in names if name.isdigit()), default=-1) + 1
        shutil.move(current, run_dir / f"metrics.{number:03d}.jsonl")
    return current
