"""The text of a question as a model sees it: one wording for training rows and for evaluation.

A model is asked the same way while it is trained and while it is evaluated, so both sides render here. The
contract is Video-R1's: the options stand below the question, one a line, the reasoning goes between
``<think>`` tags and the answer between ``<answer>`` tags, and one sentence by the type of the problem says
what form the answer has. Departure: the sentences are our own; a run that has to match a model trained on the
published wording sets its own template (:func:`render` takes any text with the field ``{question}``).

Both families of names are known: the problem types of the training rewards ("free-form", "OCR", ...) and the
kinds of benchmark questions ("open", "yes/no", ...).
"""

import string
from collections.abc import Mapping, Sequence

from keytoken.block import unknown_name
from keytoken.errors import ConfigurationError, DataError

OFFICIAL = "official"  # the benchmark's own wording; no template, see keytoken.scoring.benchmarks.base
TEMPLATES: Mapping[str, str] = {
    "reasoning": (
        "{question}\n"
        "First work out the answer step by step between <think> and </think>: say what you observe, question "
        "it and correct yourself where needed. Then write the final answer between <answer> and </answer>. "
        "{form}"
    ),
    "direct": "{question}\n{form}",
}
# What the answer looks like; the second one is for answers without tags around them.
_FORMS: Mapping[str, tuple[str, str]] = {
    "multiple choice": (
        "Inside the answer tags write the letter of one option and nothing else.",
        "Reply with the letter of one option and nothing else.",
    ),
    "numerical": (
        "Inside the answer tags write one number and nothing else, such as 7 or 2.5.",
        "Reply with one number and nothing else, such as 7 or 2.5.",
    ),
    "OCR": (
        "Inside the answer tags write the text exactly as it can be read.",
        "Reply with the text exactly as it can be read.",
    ),
    "free-form": (
        "Inside the answer tags write a short answer in words.",
        "Reply with a short answer in words.",
    ),
    "yes/no": (
        "Inside the answer tags write yes or no.",
        "Reply with yes or no.",
    ),
    "caption matching": (
        "Inside the answer tags repeat the matching option in full.",
        "Reply with the matching option in full.",
    ),
    "captioning": (
        "Inside the answer tags write one sentence that describes it.",
        "Reply with one sentence that describes it.",
    ),
}
_SAME_FORM = {"open": "free-form", "regression": "numerical"}
KNOWN_KINDS = (*_FORMS, *_SAME_FORM)


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options below it.

    Args:
        question: The question alone.
        options: Texts without letters, in the order A, B, ...; none leave the question as it is.

    Returns:
        ``"Which?\\nOptions:\\nA. red\\nB. blue"``.

    Raises:
        DataError: If there are more options than letters.
    """
    if not options:
        return question
    if len(options) > len(string.ascii_uppercase):
        raise DataError(f"a question with {len(options)} options runs out of letters; give it 26 at most")
    lines = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, "Options:", *lines])


def render(question: str, kind: str, style: str = "reasoning", *, others: Sequence[str] = ()) -> str:
    """The whole text of a question, without system prompt and without ``<video>`` tag.

    Args:
        question: The question with its options, see :func:`with_options`.
        kind: Problem type of a training row or kind of a benchmark question, one of ``KNOWN_KINDS``.
        style: "reasoning" asks for thoughts and answer in tags, "direct" for the answer alone; or a template
            of one's own with the field ``{question}`` and, if wanted, ``{form}``, which becomes the sentence
            on the answer's form.
        others: Styles that the caller knows besides, for the message about an unknown one.

    Raises:
        ConfigurationError: If the kind or the style is unknown.
    """
    name = _SAME_FORM.get(kind, kind)
    if name not in _FORMS:
        raise ConfigurationError(unknown_name(f"kind of question {kind!r}", kind, KNOWN_KINDS, "kinds"))
    template = TEMPLATES.get(style, style)
    if "{question}" not in template:
        raise ConfigurationError(
            unknown_name(f"prompt style {style!r}", style, (*others, *TEMPLATES), "styles")
            + " A template of your own holds {question}."
        )
    tagged, bare = _FORMS[name]
    form = tagged if "<answer>" in template else bare
    # Not str.format: questions hold braces, and so may a template.
    return template.replace("{form}", form).replace("{question}", question)
