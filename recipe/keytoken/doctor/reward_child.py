"""The child that calls a reward function: reads its order from standard input, prints scores as JSON.

Started by :mod:`keytoken.doctor.reward`. An error of the function ends the child with its traceback, which
the parent reads. The function is loaded by verl's rules (``pkg://module``, ``file://path``, a path) but
without verl, whose import takes longer than all other checks together.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

_FORM = "<think>\nA test of the reward function.\n</think>\n<answer>{}</answer>"


def main() -> None:
    """Answer one order."""
    order = json.load(sys.stdin)
    report = os.fdopen(os.dup(1), "w")  # what the function prints goes elsewhere
    os.dup2(2, 1)
    function = load(order["path"], order["name"])
    answers = [
        {side: _score(function, case, case[f"{side}_answer"], order["kwargs"]) for side in ("right", "wrong")}
        for case in order["cases"]
    ]
    report.write(json.dumps(answers) + "\n")
    report.close()
    sys.stdout.flush()
    os._exit(0)  # whatever threads the function has started


def load(path: str, name: str) -> Callable[..., Any]:
    """The function as verl would find it."""
    if path.startswith("pkg://"):
        module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
    else:
        file = os.path.expanduser(path.removeprefix("file://"))
        spec = importlib.util.spec_from_file_location("custom_module", file)
        if spec is None or spec.loader is None or not os.path.isfile(file):
            raise FileNotFoundError(f"reward.custom_reward_function.path: {path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def _score(function: Callable[..., Any], case: dict[str, Any], answer: str, kwargs: dict[str, Any]) -> Any:
    result = function(
        data_source=case["data_source"],
        solution_str=_FORM.format(answer),
        ground_truth=case["ground_truth"],
        extra_info=dict(case["extra_info"]),
        **kwargs,
    )
    if inspect.isawaitable(result):
        result = asyncio.run(_wait(result))
    if not isinstance(result, dict):
        return {"score": _plain(result)}
    if "score" not in result:
        raise ValueError(f"it returned a dict without 'score': {sorted(map(str, result))}")
    return {key: _plain(result[key]) for key in ("score", "acc") if key in result}


async def _wait(result: Any) -> Any:
    return await result


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as text, which the parent refuses."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool):
        return float(value)
    return value if isinstance(value, (int, float)) else repr(value)


if __name__ == "__main__":
    main()
