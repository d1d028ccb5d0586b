"""The training job: compose the configuration, check it whole, run it."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from keytoken.errors import ConfigurationError
from keytoken.validate import num_slots, validate_run

# verl reserves up to ten logical CPUs for every slot (single_controller/ray/base.py:119), besides its services.
LOGICAL_CPUS_PER_SLOT = 16
EXTERNAL_MODULE = "keytoken.verl_adapter.register"


def load_config(overrides: Sequence[str]) -> DictConfig:
    """Compose ``train.yaml`` with overrides, fill in what follows from other keys, and validate.

    Args:
        overrides: hydra overrides, such as ``experiment=demo_cpu`` or ``trainer.save_freq=10``.

    Returns:
        The resolved configuration: plain values, nothing left to interpolate.

    Raises:
        ConfigurationError: an unknown key or group, a value out of range, or keys that exclude each other.
    """
    OmegaConf.register_new_resolver("keytoken.needs_reference", _needs_reference, replace=True)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("keytoken_configs", version_base="1.3"):
            config = compose("train", overrides=list(overrides))
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as problem:
        raise ConfigurationError(_first_lines(problem)) from problem
    _derive(config)
    validate_run(config)
    return config


def train(overrides: Sequence[str]) -> Path:
    """Run a training job to its end and return its run folder."""
    config = load_config(overrides)
    run_dir = Path(config.keytoken.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, run_dir / "config.yaml")
    metrics = _fresh_metrics_file(run_dir)
    _set_environment(config, {"VERL_FILE_LOGGER_PATH": str(metrics)})

    from keytoken.verl_adapter.task_runner import run  # slow: imports verl, Ray and vLLM

    run(config)
    return run_dir


def _needs_reference(kl_coef: float) -> bool:
    return float(kl_coef) > 0.0


def _derive(config: DictConfig) -> None:
    """Values that follow from others and so have no key of their own."""
    with open_dict(config):
        config.keytoken.run_dir = str(Path(config.keytoken.run_dir).absolute())
        for key in ("default_local_dir", "validation_data_dir", "rollout_data_dir"):
            if config.trainer.get(key):
                config.trainer[key] = str(Path(config.trainer[key]).absolute())
        if config.trainer.device == "cpu":
            slots = num_slots(config)
            config.ray_kwargs.ray_init.num_gpus = slots
            config.ray_kwargs.ray_init.num_cpus = LOGICAL_CPUS_PER_SLOT * slots


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
    os.environ.update({name: str(value) for name, value in environment.items()})


def _fresh_metrics_file(run_dir: Path) -> Path:
    """``metrics.jsonl``; an earlier one is kept under the next number, because verl truncates the file."""
    current = run_dir / "metrics.jsonl"
    if current.exists():
        earlier = sorted(run_dir.glob("metrics.*.jsonl"))
        shutil.move(current, run_dir / f"metrics.{len(earlier):03d}.jsonl")
    return current


def _first_lines(problem: Exception) -> str:
    return "\n".join(line for line in str(problem).splitlines() if line.strip())
