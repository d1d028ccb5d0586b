"""The beginning of the demo: its world is prepared, and the configurations are told where it is."""

import os

from keytoken.demo.prepare import DemoAssets, DemoConfig, prepare
from keytoken.demo.validation import write_validation

DEMO_VARIABLE = "KEYTOKEN_DEMO_DIR"
# What trains the demo's model of a family.
EXPERIMENTS = {"qwen2_5_vl": "demo_cpu", "qwen3_vl": "demo_qwen3_vl"}


def prepare_for_training(family: str = "qwen2_5_vl") -> DemoAssets:
    """Prepare the demo's files and name their folder in ``$KEYTOKEN_DEMO_DIR``, where the configs look."""
    print("Preparing the demo world: clips, tokenizer and a warm-started model (once; cached afterwards).")
    assets = prepare(DemoConfig(family=family))
    write_validation(assets.heldout_file, assets.root / "validation.parquet")
    os.environ[DEMO_VARIABLE] = str(assets.root)
    print(f"Demo world: {assets.root}")
    print(f"  warm start took {assets.manifest.get('warm_start_wall_s')} s")
    return assets
