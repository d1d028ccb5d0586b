"""Where :mod:`keytoken.words` used to be."""

from keytoken.words import parse_words

__all__ = ["parse_words"]
