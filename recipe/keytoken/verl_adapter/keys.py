"""verl's keys of answers in TransferQueue: ``{prompt}_{answer}_{part}`` (verl 0.9.1, agent_loop_tq.py)."""


def place_of(key: str) -> tuple[str, int, int]:
    """Prompt, number of the answer within its group, and of its part."""
    prompt, answer, part = key.rsplit("_", 2)
    return prompt, int(answer), int(part)
