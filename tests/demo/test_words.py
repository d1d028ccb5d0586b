"""The classes of words that the demo's diagnostics count by, against the world that speaks them."""

from importlib import resources

import yaml

from keytoken.demo import world


def test_the_demos_word_classes_are_those_of_its_world() -> None:
    text = resources.files("keytoken_configs").joinpath("dataset", "demo.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["keytoken"]["diagnostics"]["word_classes"] == {
        "color": list(world.COLORS),
        "shape": list(world.SHAPES),
        "direction": list(world.DIRECTIONS),
        "event": list(world.EVENTS),
        "number": list(world.NUMBERS),
    }
