"""Exports as one HTML page: no network, no other files, and nothing of an answer is ever run.

Answers are untrusted text. They travel as JSON in a block that no browser runs, with every ``<`` escaped,
and reach the page as text nodes only. The page's policy (CSP) allows the scripts and styles written here, by
their digests, pictures that the page itself holds, and nothing else: no connection, no form, no eval.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from tqdm import tqdm

from keytoken.data.part import AnyClip
from keytoken.lens.classes import class_of, known_words
from keytoken.lens.frames import Strip, strip_of
from keytoken.lens.read import NUMBERS, SIGNALS, Answer, Export
from keytoken.lens.scale import PART

MakeStrip = Callable[[AnyClip, str, int, Mapping[str, Any], bool], Strip]
RIGHT_ABOVE = 0.5
# Signals by precedence, of methods where it is not this order; see keytoken.attribution.methods.
PRECEDENCE = {"tor": ("entropy", "visual", "temporal")}
SCRIPTS = ("vendor/uPlot.iife.min.js", "select.js", "data.js", "list.js", "panels.js", "main.js")
STYLES = ("vendor/uPlot.min.css", "lens.css")


def build_page(exports: Sequence[Export], *, title: str, compare: int | None = None) -> str:
    """The whole page.

    Args:
        exports: At least one; the page shows one at a time.
        title: What the page is of.
        compare: Number of the export that is shown beside the first one; None for none.
    """
    content = {"title": title, "compare": compare, **payload(exports, strip_of)}
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts, styles = [_resource(name) for name in SCRIPTS], [_resource(name) for name in STYLES]
    policy = (
        f"default-src 'none'; script-src {_digests(scripts)}; style-src {_digests(styles)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    licence = _resource("vendor/LICENSE.uPlot").replace("--", "- -")
    parts = {
        "TITLE": html.escape(title),
        "POLICY": policy,
        "LICENCE": f"<!-- uPlot, inlined below:\n{licence}-->",
        "STYLES": "\n".join(f"<style>{text}</style>" for text in styles),
        "DATA": data,
        "SCRIPTS": "\n".join(f"<script>{text}</script>" for text in scripts),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], _resource("lens.html"))


def payload(exports: Sequence[Export], strip: MakeStrip) -> dict[str, Any]:
    """What the page's scripts read: answers of all exports one after another, token arrays as base64.

    Args:
        exports: The exports.
        strip: Makes the frames of a clip; see :func:`keytoken.lens.frames.strip_of`.
    """
    answers = [answer for export in exports for answer in export.answers]
    texts = sorted({text for answer in answers for text in answer.texts})
    number = {text: i for i, text in enumerate(texts)}
    known = [known_words(export.about.get("word_classes")) for export in exports]
    merged = {word: name for words in reversed(known) for word, name in words.items()}
    prompts, prompt_of = _prompts(exports, strip)
    columns = {name: _column(answers, name) for name in NUMBERS}
    return {
        "exports": [_export(export) for export in exports],
        "scalePart": PART,
        "prompts": prompts,
        "answers": {
            "export": [place for place, export in enumerate(exports) for _ in export.answers],
            "prompt": prompt_of,
            "number": [answer.number for answer in answers],
            "reward": [_finite(answer.reward) for answer in answers],
            "right": [flag for export in exports for flag in _right(export)],
            "rowKey": [answer.row_key for answer in answers],
            "groupSize": [answer.group_size for answer in answers],
            "length": [len(answer.texts) for answer in answers],
            **{name: [answer.applies[name] for answer in answers] for name in SIGNALS},
        },
        "vocabulary": texts,
        "classes": [class_of(text, merged) for text in texts],
        "words": _base64(
            np.array([number[text] for answer in answers for text in answer.texts], dtype="<u4")
        ),
        "columns": {name: text for name, text in columns.items() if text is not None},
        "flags": _base64(np.concatenate([np.zeros(0, np.uint8), *map(_flags, answers)])),
    }


def _export(export: Export) -> dict[str, Any]:
    method = export.about.get("method") or {}
    return {
        "run": export.run,
        "step": export.step,
        "version": export.version,
        "missing": list(export.missing),
        "method": method.get("name"),
        "control": method.get("control", "none"),
        "selection": method.get("selection"),
        "precedence": PRECEDENCE.get(str(method.get("name")), SIGNALS),
        "views": method.get("view") or {},
        "tieSeed": export.about.get("tie_seed"),
        "batchAnswers": export.about.get("batch_answers"),
    }


def _right(export: Export) -> list[bool | None]:
    """Whether answers are right; of older exports those with the largest reward, if rewards differ."""
    if export.version >= 2:
        return [None if a.accuracy is None else a.accuracy > RIGHT_ABOVE for a in export.answers]
    rewards = [answer.reward for answer in export.answers]
    known = {reward for reward in rewards if np.isfinite(reward)}
    if len(known) < 2:
        return [None] * len(rewards)
    return [reward >= max(known) if np.isfinite(reward) else None for reward in rewards]


def _prompts(exports: Sequence[Export], strip: MakeStrip) -> tuple[list[dict[str, Any]], list[int]]:
    """The prompts of all exports, and the number of each answer's prompt."""
    answers = [(place, answer) for place, export in enumerate(exports) for answer in export.answers]
    firsts: dict[tuple[int, str], Answer] = {}
    for place, answer in answers:
        firsts.setdefault((place, answer.prompt_id), answer)
    viewed = {(place, answer.prompt_id) for place, answer in answers if answer.applies["temporal"]}
    number_of = {key: number for number, key in enumerate(firsts)}
    prompts = []
    clips = sum(len(answer.clips or ()) for answer in firsts.values())
    with tqdm(total=clips, desc="reading clips", unit="clip", delay=2.0, leave=False) as bar:
        for (place, name), answer in firsts.items():
            strips = []
            for number, clip in enumerate(answer.clips or ()):
                made = strip(clip, name, number, exports[place].about, (place, name) in viewed)
                strips.append(_strip(made))
                bar.update()
            prompts.append(
                {
                    "export": place,
                    "id": name,
                    "text": question_of(answer.prompt),
                    "strips": strips,
                    "clipsKnown": answer.clips is not None,
                }
            )
    return prompts, [number_of[place, answer.prompt_id] for place, answer in answers]


def question_of(prompt: str) -> str:
    """A prompt without the names of roles that a chat template leaves around it."""
    text = prompt.strip().removesuffix("\nassistant").rstrip()
    return text.removeprefix("user\n").strip()


def _strip(strip: Strip) -> dict[str, Any]:
    order = None if strip.order is None else list(strip.order)
    return {
        "path": strip.path,
        "frames": list(strip.frames),
        "times": list(strip.times),
        "aspect": strip.aspect,
        "order": order,
        "note": strip.note,
    }


def _column(answers: Sequence[Answer], name: str) -> str | None:
    """One number for each token of all answers, NaN where an answer has none; None if no answer has any."""
    if all(name not in answer.values for answer in answers):
        return None
    rows = [
        answer.values.get(name, np.full(len(answer.texts), np.nan, dtype=np.float32)) for answer in answers
    ]
    return _base64(np.concatenate(rows).astype("<f4"))


def _flags(answer: Answer) -> np.ndarray:
    """Bits 0 to 2: selected by each signal; 3 to 5: whether that is known; 6: part of the loss."""
    bits = np.zeros(len(answer.texts), dtype=np.uint8)
    for place, name in enumerate(SIGNALS):
        if name in answer.selected:
            bits |= answer.selected[name].astype(np.uint8) << place
            bits |= np.uint8(8 << place)
    return bits | (answer.counted.astype(np.uint8) << 6)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _digests(texts: Sequence[str]) -> str:
    """The sources of a policy that allow exactly these texts."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _resource(name: str) -> str:
    return resources.files("keytoken.lens").joinpath("web", name).read_text(encoding="utf-8")
