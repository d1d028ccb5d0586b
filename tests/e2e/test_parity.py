"""Each known bug, brought back in running pools, is caught by the parity gate and named (``sabotage.py``).

Those of Qwen3-VL: ``test_qwen3_vl.py``.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SABOTAGE = str(Path(__file__).with_name("sabotage.py"))

SAID = {
    "nothing": None,  # mended, video, image, both and text agree, and the run goes on
    # Positions of another shape cannot be packed; with a prompt for each answer they were wrong in silence.
    "B1 in the actor": "pass of old log-probs of the actor crashed",
    "B2": "positions of row 0 of the training data [prompt train-00000",
    "B3": "seconds of row 0 of the training data [prompt train-00000",
    "B4 in positions": "positions of an answer that ends in token",
    "B4 in the engine": "vision tokens",
    "B5 in the actor": "pass of old log-probs of the actor crashed",
    "B5 in the attribution group": "pass over the real input of the attribution group crashed",
    "B5 in a view": "pass over the view 'masked' of the attribution group crashed",
    "other pixels": "pixels of row 0 of the training data [prompt train-00000",
    "B9": "asked behind step 1 differ between vLLM engine and actor",
    "B10": "log-probs of row 0 of the training data [prompt train-00000",
}


def with_pictures(train, folder):
    """The rows of a training file, and two with an image: instead of the clip, and beside it."""
    picture = folder / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(noise).save(picture)
    rows = [{**row, "images": []} for row in pq.read_table(train).to_pylist()]
    for kind, video in (("image", []), ("both", rows[0]["videos"])):
        row = copy.deepcopy(rows[0]) | {"videos": video, "images": [{"image": str(picture)}]}
        question = row["prompt"][0]["content"].removeprefix("<video>")
        row["prompt"][0]["content"] = "<image>" + "<video>" * len(video) + question
        row["extra_info"]["prompt_id"] = f"train-{kind}"
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder / "train.parquet"


@pytest.fixture(scope="module")
def said(launcher, tiny_world, tmp_path_factory):
    """What the gate said of each bug, in one run of one step; it asks a prompt of every kind."""
    train = with_pictures(tiny_world / "train.parquet", tmp_path_factory.mktemp("pictures"))
    file = tmp_path_factory.mktemp("sabotage") / "said.json"
    variables = {"KEYTOKEN_SABOTAGE": str(file), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    words = ("trainer.save_freq=-1", "trainer.total_training_steps=1", "keytoken.parity.every_steps=1")
    words += (f"data.train_files={train}", "keytoken.parity.prompts=4")
    launcher.run("sabotage", *words, program=(SABOTAGE,), environment=variables)
    return json.loads(file.read_text())


@pytest.mark.parametrize("bug", SAID)
def test_the_gate_names_the_bug(said, bug):
    assert (said[bug] is None) if SAID[bug] is None else (SAID[bug] in said[bug])


def test_every_bug_was_asked_about(said):
    assert said.keys() == SAID.keys()
