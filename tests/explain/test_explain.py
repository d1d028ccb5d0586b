"""``keytoken explain``: what is said of every preset, of overrides, and of every choice of an option."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import typing

import pytest

from keytoken.attribution.scores import COMPARISONS
from keytoken.cli import main
from keytoken.compose import VARIABLES, groups
from keytoken.explain import explain, loss_words, words
from keytoken.explain.notes import METHOD, read_preset
from keytoken.explain.page import WIDTH, docstring_lines, plain_page
from keytoken.explain.run import Run, compose_run, values_of
from keytoken.losses.objectives import OBJECTIVES
from keytoken.schema import LossConfig, MethodConfig, SelectionConfig

# What a page must say, whatever its wording elsewhere: the figures that make each preset what it is.
FACTS = {
    "all": ("every answer token counts", "sum_i 1/|o_i|", "0.8, 1.2"),
    "cispo": ("clip(rho, 0, 1.2)", "no gradient through the factor", "no reference model runs"),
    "dapo": ("0.8, 1.28", "algorithm.filter_groups.enable true", "overlong_buffer_cfg.enable true"),
    "dr_grpo": ("1/40 sum_t w l", "A = r - mean", "algorithm.norm_adv_by_std_in_grpo false"),
    "grpo": ("0.8, 1.2", "at most 3 |A|", "0.001 times k3", "sum_i |o_i|"),
    "gspo": ("s = exp(mean_t log rho)", "0.9997, 1.0004"),
    "high_entropy": ("entropy 20 %", "exactly 20 %", "sum_i |S_i|", "at most 10 |A|", "the rollout batch"),
    "inverse": ("top 20 %", "weight 1 at the tokens that the method leaves out"),
    "papo_dapo": ("minus 0.01 times", "p = 0.6", "once for all answers", "0.03 times the mean of -log p"),
    "papo_grpo": ("minus 0.02 times", "0.8, 1.3", "0.05 times the mean of -log p", "0.01 times k3"),
    "random": ("top 20 %", "at random tokens of the same answer"),
    "soft": ("option temperature 0.5", "option anneal_steps null"),
    "t_grpo": ("+0.3 for every answer", "above 0.1", "at least 0.8 times", "4 more answers", "rho is 1"),
    "tor_dapo": ("visual 30 % 0.5", "entropy 30 % 1", "mass 0.95", "0.8, 1.28", "filter_groups.enable true"),
    "tor_grpo": ("visual 30 % 0.5", "entropy 30 % 1", "mass 0.95", "exactly 30 %", "the rollout batch"),
    "tw_grpo": ("option alpha 1.", "weighed by disagreement", "measures disagreement", "rho is 1"),
    "video_ktr": ("top 20 %", "its own answer", "|log p - log q|", "1/|o_i|", "std + 0.0001"),
    "video_ktr_official": (
        "log p - log q, q under masked",
        "all answers to its prompt",
        "1/|S_i|",
        "renumbered",
    ),
    "vppo": ("exactly 40 %", "q/p - log(q/p) - 1", "p = 0.5", "least_factor 0.9", "0.06 times", "0.8, 1.28"),
}


@functools.cache
def run_of(*overrides: str) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        return compose_run(overrides)


def page_of(*overrides: str) -> str:
    return plain_page(run_of(*overrides))


def flat(text: str) -> str:
    return " ".join(text.split())


def section_of(text: str, title: str) -> str:
    """A section without its title: all up to the next line that starts at the margin."""
    lines = text.partition(f"\n{title}\n")[2].splitlines()
    end = next((i for i, line in enumerate(lines) if line[:1].strip()), len(lines))
    return "\n".join(lines[:end]).rstrip()


def test_there_are_facts_about_every_preset() -> None:
    assert sorted(FACTS) == groups()["method"]


@pytest.mark.parametrize("name", FACTS)
def test_a_page_says_what_makes_the_preset(name: str) -> None:
    text = flat(page_of(f"method={name}"))
    assert [fact for fact in FACTS[name] if fact not in text] == []


@pytest.mark.parametrize("name", FACTS)
def test_a_page_lists_every_value_of_the_preset_with_its_mark(name: str) -> None:
    run = run_of(f"method={name}")
    table = flat(section_of(page_of(f"method={name}"), "What is known of its values"))
    values = values_of(run.config)
    for key, note in read_preset(name).notes.items():
        if key != f"{METHOD}.name":
            row = f"{key.removeprefix(f'{METHOD}.')} {words.value_text(values[key])} {note.mark}"
            assert row in table, key


@pytest.mark.parametrize("name", FACTS)
def test_a_page_is_plain_text_that_fits(name: str) -> None:
    lines = page_of(f"method={name}").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert all(line == line.rstrip() for line in lines)
    text = "\n".join(lines)
    assert "\x1b" not in text and "``" not in text and ":class:" not in text
    assert "*" not in text.replace("****", "")  # nothing was changed on the command line


def test_one_section_word_by_word() -> None:
    section = section_of(page_of("method=tor_grpo"), "Loss")
    assert section.replace("\n" + 19 * " ", " ") == (
        "  objective        l = max(-rho A, -clip(rho, 0.8, 1.2) A), at most 3 |A| where A is negative\n"
        "  denominator      one sum over all answers of the update, by the number of all their tokens, "
        "selected or not: sum_i sum_t w l / sum_i |o_i|\n"
        "  KL to reference  0.01 times k3 at all answer tokens, over their number (log-ratio within +-20, "
        "k3 within +-10)\n"
        "  advantage        A = (r - mean) / (std + 1e-06) over the answers to a prompt, unbiased std"
    )


def test_passes_follow_the_configuration() -> None:
    def labels(*overrides: str) -> list[str]:
        return [row.label for row in words.passes(run_of(*overrides))]

    full = ["actor, real input", "attribution, real input", "attribution, masked", "attribution, shuffled"]
    last = ["update", "parity gate"]
    assert labels("method=video_ktr") == [*full, "reference, real input", *last]
    assert labels("method=video_ktr", "keytoken.method.loss.kl_coef=0") == [*full, *last]
    unchecked = labels("method=video_ktr", "keytoken.attribution.check_base=false")
    assert "attribution, real input" not in unchecked
    assert labels("method=dapo") == ["actor, real input", *last]
    # Measures need the real pass, checked or not, and no view.
    measured = labels("method=tw_grpo", "keytoken.attribution.check_base=false")
    assert measured[:2] == full[:2] and "attribution, masked" not in measured
    assert labels("method=t_grpo")[0] == "rollout, frames shuffled"
    reversed_frames = labels("method=video_ktr", "keytoken.method.view.temporal=reversed")
    assert "attribution, reversed" in reversed_frames and "attribution, shuffled" not in reversed_frames


def test_the_parity_gate_is_said_with_its_steps() -> None:
    text = flat(page_of("method=video_ktr", "keytoken.parity.prompts=3", "keytoken.parity.every_steps=7"))
    assert "parity gate * 3 prompts on which engine and passes have to agree" in text
    assert "and again behind every 7 steps" in text
    assert "again behind" not in page_of("method=video_ktr", "keytoken.parity.every_steps=null")
    assert "parity gate * off" in flat(page_of("method=video_ktr", "keytoken.parity.prompts=0"))


def test_passes_that_run_in_some_steps_only() -> None:
    stands_in = flat(page_of("method=video_ktr", "keytoken.attribution.on_failure=actor"))
    assert "the passes go on in the actor's workers" in stands_in
    text = flat(page_of("method=video_ktr", "keytoken.attribution.every_steps=4"))
    assert "attribution group lost" not in text
    assert "attribution passes run * in one step of 4" in text
    assert "passes run" not in page_of("method=video_ktr")


def test_a_view_is_described_by_its_own_file() -> None:
    text = flat(page_of("method=video_ktr", "keytoken.method.view.temporal=frozen"))
    assert "The first frame of every video in all places, so that nothing moves" in text


def test_overrides_are_marked_where_they_matter() -> None:
    text = page_of(
        "method=tor_grpo",
        "keytoken.method.selection.visual_ratio=0.4",
        "keytoken.method.selection.floor=0.05",
    )
    heading = text.partition("What it is")[0]
    assert "keytoken.method.selection.visual_ratio = 0.4 (was 0.3)" in heading
    assert "keytoken.method.selection.floor = 0.05 (was null)" in heading
    signals = flat(section_of(text, "Signals: p under the real input, q under a view"))
    assert "visual * 40 % 0.5" in signals and "entropy 30 % 1" in signals
    weights = flat(section_of(text, "Token weights"))
    assert "floor * a kept token scores at least 0.05" in weights
    assert "scope and rule * each signal keeps exactly its share" in weights
    assert "*" not in section_of(text, "Loss")
    known = flat(section_of(text, "What is known of its values"))
    assert "selection.visual_ratio 0.4 overridden * preset: 0.3" in known
    assert "selection.floor 0.05 overridden * not a key of the preset" in known
    assert "selection.entropy_ratio 0.3 known reasoning tokens" in known


def test_a_selection_that_is_switched_off() -> None:
    text = page_of("method=video_ktr", "keytoken.method.selection=null")
    assert "selection * nothing is selected: every answer token counts" in flat(text)
    known = section_of(text, "What is known of its values")
    assert "selection.visual_ratio" not in known and "Signals" not in text


def test_another_experiment_is_explained_as_it_is() -> None:
    text = page_of("experiment=video_ktr_7b")
    assert text.startswith("method=video_ktr_official\n")
    assert "In the configuration of experiment=video_ktr_7b." in text


def test_what_an_experiment_changes_is_shown_with_the_preset() -> None:
    """grpo_7b switches the selection of its preset off, which is no override of the command line."""
    text = page_of("experiment=grpo_7b")
    assert "nothing is selected: every answer token counts" in flat(text)
    known = flat(section_of(text, "What is known of its values"))
    assert "selection null experiment set by experiment=grpo_7b" in known and "selection.scope" not in known


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYTOKEN_DEMO_DIR", raising=False)
    before = dict(os.environ)
    explain(["method=grpo"], io.StringIO())
    assert dict(os.environ) == before


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "method=grpo"]) == 0
    assert capsys.readouterr().out.startswith("method=grpo\n")
    assert main(["explain", "method=torr_grpo"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "Did you mean 'tor_grpo'?" in message
    assert main(["explain", "method=tor_grpo", "keytoken.method.selection.visual_ratio=2"]) == 2
    assert "keytoken.method.selection.visual_ratio is 2.0; use 0 (off) to 1" in capsys.readouterr().err


def choices_of(kind: type, field: str) -> tuple[str, ...]:
    return typing.get_args(typing.get_type_hints(kind)[field])


BASE = run_of("method=video_ktr").keytoken.method


@pytest.mark.parametrize("score", COMPARISONS)
@pytest.mark.parametrize("sign", choices_of(SelectionConfig, "score_sign"))
def test_every_score_has_a_formula(score: str, sign: str) -> None:
    if sign == "signed" and score not in ("difference", "probability"):
        pytest.skip("refused by the configuration")
    assert BASE.selection is not None
    selection = dataclasses.replace(BASE.selection, score=score, score_sign=sign)
    rows = words.signals(dataclasses.replace(BASE, selection=selection))
    assert [row.name for row in rows] == ["visual", "temporal", "entropy"]
    assert rows[0].score.startswith("|") == (sign == "absolute" and score in ("difference", "probability"))
    assert "masked" in rows[0].score and "shuffled" in rows[1].score


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("level", choices_of(LossConfig, "level"))
@pytest.mark.parametrize("normalizer", choices_of(LossConfig, "normalizer"))
@pytest.mark.parametrize("control", choices_of(MethodConfig, "control"))
def test_every_loss_and_control_has_words(objective: str, level: str, normalizer: str, control: str) -> None:
    if level == "batch" and (normalizer == "constant" or objective == "gspo"):
        pytest.skip("refused by the configuration")
    length = 77 if normalizer == "constant" else None
    loss = dataclasses.replace(
        BASE.loss, objective=objective, level=level, normalizer=normalizer, constant_length=length
    )
    method = dataclasses.replace(BASE, loss=loss, control=control)
    run = dataclasses.replace(
        run_of("method=video_ktr"),
        keytoken=dataclasses.replace(run_of("method=video_ktr").keytoken, method=method),
    )
    text = {row.label: row.text for row in (*loss_words.loss(run), *words.weighing(run))}
    assert ("G" in text["denominator"]) == (level == "response")
    assert {"selected": "|S_i|", "all": "|o_i|", "constant": "1/77"}[normalizer] in text["denominator"]
    assert ("random" in text["control"], "leaves out" in text["control"]) == (
        control == "random",
        control == "inverse",
    )


def test_docstrings_as_text() -> None:
    source = (
        "One paragraph that\ngoes on, with ``code`` and :func:`~a.b` in it::\n\n"
        "    x  = first line of a formula\n    y  = another          (eq. 5)\n\n"
        "- an item that\n  goes on\n- another"
    )
    assert list(docstring_lines(source, 60)) == [
        "One paragraph that goes on, with `code` and a.b in it:",
        "",
        "  x  = first line of a formula",
        "  y  = another          (eq. 5)",
        "",
        "- an item that goes on",
        "- another",
    ]
    assert list(docstring_lines("    y  = another          (eq. 5)", 30)) == ["  y  = another  (eq. 5)"]
    assert max(map(len, docstring_lines(source, 24))) <= 24
