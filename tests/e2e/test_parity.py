"""Each known bug, brought back in running pools, is caught by the parity gate and named (``sabotage.py``)."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

SABOTAGE = str(Path(__file__).with_name("sabotage.py"))

SAID = {
    "nothing": None,  # mended, the run goes on
    "B1 in the actor": "log-probs of row 0 of the training data [prompt train-00000",
    "B2": "positions of row 0 of the training data [prompt train-00000",
    "B3": "seconds of row 0 of the training data [prompt train-00000",
    "B4 in positions": "positions of an answer that ends in token",
    "B4 in the engine": "vision tokens",
    "B5 in the actor": "pass of old log-probs of the actor crashed",
    "B5 in the attribution group": "pass over the real input of the attribution group crashed",
    "B5 in a view": "pass over the view 'masked' of the attribution group crashed",
    "B8": "pixels of row 0 of the training data [prompt train-00000",
    "B9": "asked behind step 1 differ between vLLM engine and actor",
    "B10": "log-probs of row 0 of the training data [prompt train-00000",
}


@pytest.fixture(scope="module")
def said(launcher, tmp_path_factory):
    """What the gate said of each bug, in one run of one step."""
    file = tmp_path_factory.mktemp("sabotage") / "said.json"
    variables = {"KEYTOKEN_SABOTAGE": str(file), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    launcher.run("sabotage", "trainer.save_freq=-1", program=(SABOTAGE,), environment=variables)
    return json.loads(file.read_text())


@pytest.mark.parametrize("bug", SAID)
def test_the_gate_names_the_bug(said, bug):
    assert (said[bug] is None) if SAID[bug] is None else (SAID[bug] in said[bug])


def test_every_bug_was_asked_about(said):
    assert said.keys() == SAID.keys()
