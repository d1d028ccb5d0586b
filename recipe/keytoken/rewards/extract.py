"""Takes the answer out of a response.

Video-R1's rules: the first ``<answer>`` block counts, and a response is well-formed if it is one
``<think>`` block followed by one ``<answer>`` block and nothing else. They are written as plain searches
whose time is linear in the length: the equivalent lazy regular expressions take quadratic time on
hostile answers.
"""

import re

_SEAM = re.compile(r"</think>\s*<answer>")


def extract_answer(response: str) -> str:
    """Content of the first ``<answer>`` block, stripped; empty if there is none."""
    _, opened, rest = response.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() if opened and closed else ""


def has_format(response: str) -> bool:
    """Whether the whole response matches ``<think>.*?</think>\\s*<answer>.*?</answer>``.

    As in Video-R1, tags inside the blocks are not looked at, and whitespace around the response is not
    allowed.
    """
    if not (response.startswith("<think>") and response.endswith("</answer>")):
        return False
    return _SEAM.search(response, len("<think>")) is not None
