"""Asks the configured reward function about right and wrong answers to questions of the dataset.

The function is somebody's code: it runs in a child (:mod:`keytoken.doctor.reward_child`), where it may raise,
hang or print.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from keytoken.doctor.child import run_child
from keytoken.doctor.finding import Finding, Subject, fail, ok, skip, warn
from keytoken.doctor.rows import Row, training_rows, truth_of

_LIMIT_S = 60.0
_CASES, _SHORT_CASES = 24, 2
_OF_A_KIND = 2  # of a source, problem type and ability
_TOKENS = 100  # stated length of the answers
_WRONG = {"numerical": "-987654.25", "regression": "-987654.25"}


def reward(subject: Subject) -> Finding:
    """It answers in numbers, and a right answer in the expected form is worth more than a wrong one."""
    function = subject.run.reward.get("custom_reward_function") or {}
    if not function.get("path"):
        return skip("no reward.custom_reward_function; verl's own is chosen by data_source")
    if subject.run.reward.reward_model.enable:
        return skip("the run's reward model takes part in the reward, and does not run yet")
    cases = _cases(subject)
    if not cases:
        return skip("no row of data.train_files has a text or a number as ground_truth")
    name = f"{function.get('name')} of {function['path']}"
    kwargs = OmegaConf.to_container(OmegaConf.create(function.get("reward_kwargs") or {}))
    order = {"path": function["path"], "name": function.get("name"), "kwargs": kwargs, "cases": cases}
    given = OmegaConf.select(subject.run, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    done = run_child(
        ["-m", "keytoken.doctor.reward_child"],
        _LIMIT_S,
        text=json.dumps(order, default=str),
        variables={key: str(value) for key, value in given.items()},
    )
    if done.late:
        return warn(
            f"{name}: {2 * len(cases)} answers take it more than {_LIMIT_S:g} s",
            "See whether it hangs; a judge that is so slow holds up every step.",
        )
    if done.error:
        place = f", {done.place}" if done.place else ""
        return fail(
            f"{name}: {done.error}{place}",
            "Correct reward.custom_reward_function, or the rows that it cannot read.",
        )
    return judge(name, cases, json.loads(done.output.splitlines()[-1]))


def judge(name: str, cases: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Finding:
    """Compare the scores of right and wrong answers.

    Args:
        name: Of the function, for messages.
        cases: The questions.
        answers: For each its scores, as ``right`` and ``wrong``: ``score``, and ``acc`` where there is one.
    """
    measure = "acc" if all("acc" in each[side] for each in answers for side in each) else "score"
    pairs = [(each["right"][measure], each["wrong"][measure]) for each in answers]
    odd = next((value for pair in pairs for value in pair if not _finite(value)), None)
    if odd is not None:
        return fail(f"{name} returns {measure}={odd!r}", "Let it return a number, or a dict with score.")
    worse = [number for number, (right, wrong) in enumerate(pairs) if not right > wrong]
    remedy = (
        "Compare the answer's form with the one it reads (<answer>...</answer>), and problem_type and "
        "ground_truth of the rows."
    )
    if worse:
        case, (right, wrong) = cases[worse[0]], pairs[worse[0]]
        words = (
            f"{name}: in {len(worse)} of {len(pairs)} rows a right answer is worth no more than a wrong one; "
            f"row {case['row']}: {case['right_answer']!r} has {measure} {right:g}, "
            f"{case['wrong_answer']!r} has {wrong:g}"
        )
        return warn(words, remedy)  # it may read another form of answers than the one tried here
    low, high = (sum(values) / len(values) for values in zip(*((w, r) for r, w in pairs), strict=True))

    return ok(f"{name}: mean {measure} {high:.2f} for right, {low:.2f} for wrong answers, {len(pairs)} rows")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _cases(subject: Subject) -> list[dict[str, Any]]:
    """Rows of every kind, each with a right and a wrong answer."""
    cases: list[dict[str, Any]] = []
    kinds: dict[tuple[str, ...], int] = {}
    for number, (_, row) in enumerate(training_rows(subject)):
        truth, info = truth_of(row), row.get("extra_info")
        info = info if isinstance(info, Mapping) else {}
        kind = tuple(
            str(each) for each in (row.get("data_source"), info.get("problem_type"), row.get("ability"))
        )
        if not isinstance(truth, (str, int, float)) or kinds.get(kind, 0) >= _OF_A_KIND:
            continue  # how an answer says a list or a mapping is the function's own affair
        kinds[kind] = kinds.get(kind, 0) + 1
        cases.append(_case(number, row, truth, info))
        if len(cases) == (_SHORT_CASES if subject.short else _CASES):
            break
    return cases


def _case(number: int, row: Row, truth: str | float, info: Mapping[str, Any]) -> dict[str, Any]:
    bare = str(truth).strip()
    if "<answer>" in bare:
        bare = bare.partition("<answer>")[2].partition("</answer>")[0]
    wrong = _WRONG.get(str(info.get("problem_type")), "zzz qqq")
    if len(bare) == 1 and bare.isalpha():
        wrong = "B" if bare != "B" else "C"
    return {
        "row": number,
        "data_source": row.get("data_source"),
        "ground_truth": truth,
        "extra_info": {**info, "response_length": _TOKENS},
        "right_answer": bare.strip(),
        "wrong_answer": wrong,
    }
