"""``keytoken explain``: one method in words and numbers, as the configuration of a run would have it.

Everything said follows from that configuration, from the docstrings of what it names and from the comments of
its preset: a new method, view or preset is explained without a line here.
"""

from keytoken.explain.page import explain

__all__ = ["explain"]
