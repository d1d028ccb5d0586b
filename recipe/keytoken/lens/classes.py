"""Classes of words: those of a run's configuration, then everyday ones, then by the characters alone."""

from collections.abc import Iterable, Mapping

from keytoken.attribution.diagnostics import word_class

# English words whose class says what an answer looked at; those of a run's configuration come first.
EVERYDAY: dict[str, str] = {
    "order": "first then next last before after finally later earlier begins starts ends while until again",
    "motion": "left right up down moves moving move turns rotates falls rises enters leaves towards away",
    "change": "grows shrinks brightens fades appears disappears opens closes changes becomes",
    "colour": "red green blue yellow black white orange purple brown grey gray pink",
    "shape": "square circle triangle cross round rectangle star line shape shapes",
    "number": "zero one two three four five six seven eight nine ten many few several",
    "reason": "so because therefore thus hence but however since if answer means",
}


def known_words(configured: Mapping[str, Iterable[str]] | None) -> dict[str, str]:
    """The class of every known word."""
    known = {word: name for name, words in EVERYDAY.items() for word in words.split()}
    return known | {word: str(name) for name, words in (configured or {}).items() for word in words}


def class_of(text: str, known: Mapping[str, str]) -> str:
    """The class of a token; letters of either case are the same word, but one alone names an option."""
    word = text.strip()
    return word_class(text, known) if len(word) < 2 or word in known else word_class(word.lower(), known)
