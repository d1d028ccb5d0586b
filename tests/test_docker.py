"""The images' descriptions: versions stand in the lock alone, nobody runs as root, no secret stays behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
IMAGES = {"Dockerfile": "gpu", "Dockerfile.cpu": "cpu"}
# Lines of an image's description that are one instruction each, without comments.
Instructions = list[tuple[str, str]]


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest) -> tuple[str, Instructions]:
    """Which lock an image is made of, and its instructions."""
    text = (ROOT / "docker" / request.param).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return IMAGES[request.param], [(word, rest) for word, _, rest in (line.partition(" ") for line in whole)]


def of(instructions: Instructions, word: str) -> list[str]:
    return [rest for name, rest in instructions if name == word]


def test_versions_come_from_the_lock(image: tuple[str, Instructions]) -> None:
    """No package stands in an image's description with a version, nor by itself in a pip install."""
    lock, instructions = image
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / f"{lock}.txt").read_text(), re.MULTILINE)
    assert len(pins) > 100
    for run in of(instructions, "RUN"):
        installs = re.findall(r"pip install (.*?)(?:&&|;|$)", run)
        for words in installs:
            without_reading = re.sub(r'"\$\(sed [^)]*\)\s*[^"]*"', "", words)
            named = {canonicalize_name(word) for word in without_reading.split()}
            assert named & {canonicalize_name(pin) for pin in pins} == set(), run
        assert re.findall(r"[\w-]+==\d", run) == []
    assert any(f"requirements/{lock}.txt" in rest or "setup.sh" in rest for rest in of(instructions, "RUN"))


def test_the_lock_names_flash_attn_once() -> None:
    """The GPU image takes its version from the head of the lock, by this pattern."""
    lines = (ROOT / "requirements" / "gpu.txt").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if re.match(r"#.*flash-attn==\d+(\.\d+)+$", line)]) == 1


def test_nobody_is_root_and_the_doctor_looks_after_it(image: tuple[str, Instructions]) -> None:
    _, instructions = image
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    final = instructions[last:]
    user = of(final, "USER")[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # a number: Kubernetes cannot tell who a name is
    (check,) = of(final, "HEALTHCHECK")
    assert '"keytoken", "doctor"' in check
    assert "org.opencontainers.image.licenses" in " ".join(of(final, "LABEL"))
    assert of(instructions, "FROM")[-1] != of(instructions, "FROM")[0]  # built elsewhere, copied here


def test_no_secret_stays_in_an_image(image: tuple[str, Instructions]) -> None:
    _, instructions = image
    for word in ("ARG", "ENV"):
        for rest in of(instructions, word):
            words = rest.lower().replace("/keytoken/", "")
            assert not re.search(r"token|secret|passw|key|index|proxy", words), rest
    copied = " ".join(of(instructions, "COPY") + of(instructions, "ADD"))
    assert "pip.conf" not in copied and "://" not in copied


def test_the_context_is_small() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv", "outputs", "runs", "build"} <= set(ignored)
