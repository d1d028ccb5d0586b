"""The plan as a whole: what moves, how long it takes, what is warned of, what the command prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from keytoken.cli import main
from keytoken.compose import compose_config, groups
from keytoken.errors import ConfigurationError
from keytoken.plan.assumptions import DEVICES, Assumptions
from keytoken.plan.batches import batches_of
from keytoken.plan.flops import vision_flops
from keytoken.plan.passes import StepFlops, step_flops
from keytoken.plan.picture import draw, spans
from keytoken.plan.report import report
from keytoken.plan.run import Plan, plan_of
from keytoken.plan.traffic import clip_bytes
from keytoken.plan.workload import Workload

GPU_POOLS = {"one_device": 1, "one_gpu": 1, "three_pools": 8, "two_nodes": 16, "eight_nodes": 64}
TOKENS = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
EXPERIMENTS = sorted(name for name in groups()["experiment"] if not name.startswith("demo"))


@pytest.mark.parametrize("pools", GPU_POOLS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_on_every_pool(experiment: str, pools: str) -> None:
    """Composes, passes all rules and fits 80 GB, unless the one device is asked to hold all of it."""
    plan = plan_of([f"experiment={experiment}", f"pools={pools}"])
    unused = plan.pools.total == GPU_POOLS[pools] - (
        0 if plan.work.passes or plan.pools.together else free(pools)
    )
    assert unused
    full = [text for text in plan.warnings if "wait for their turn" not in text]
    assert bool(full) == (pools == "one_device")


def free(pools: str) -> int:
    """GPUs of an attribution pool that a method without passes leaves alone."""
    return {"three_pools": 1, "two_nodes": 4, "eight_nodes": 16}[pools]


@pytest.fixture(scope="module")
def seven_billion() -> Plan:
    return plan_of(["experiment=video_ktr_7b"])


def test_a_clip_of_the_published_runs(seven_billion: Plan) -> None:
    """16 frames of 16:9 and at most 105,369 pixels: 224 x 420, 15 by 8 tokens for each pair."""
    assert seven_billion.work.grid == (8, 16, 30)
    assert seven_billion.work.video_tokens == 8 * 15 * 8


def test_pixels_that_were_measured() -> None:
    """A real TransferQueue moved 324.7 MB in and 651.5 MB out for 16 prompts, 8 answers and two readers.

    Of clips of the largest size (tests/verl_adapter/bench_media.py), messages and token fields included.
    """
    square = ["plan.clip_height=308", "plan.clip_width=336", "data.train_batch_size=16"]
    one_reader = ["trainer.n_gpus_per_node=1", "keytoken.attribution.num_workers=1"]
    plan = plan_of(["experiment=video_ktr_7b", *square, *one_reader])
    assert plan.work.grid == (8, 22, 24)
    largest = 105369 / 196 / (22 * 24)
    assert plan.traffic.media_put * largest / 1e6 == pytest.approx(324.7, rel=0.02)
    assert plan.traffic.media_got * largest / 1e6 == pytest.approx(651.5, rel=0.02)
    assert clip_bytes(plan.model, plan.work) == 8 * 22 * 24 * 1176 * 4


def test_weights_and_gathers_by_hand(seven_billion: Plan) -> None:
    traffic, whole = seven_billion.traffic, 2 * 8_292_166_656
    assert traffic.weights == whole * 4  # three engines and one scorer
    group = seven_billion.work.prompt_tokens - 1 + 8 * 361
    packs = -(-256 // 4 // 8 // (22528 // group))  # of whole groups
    assert packs == 2
    # Log-probs and reference once, the update both ways and float32 gradients; three quarters are away.
    assert traffic.gathers == (2 * packs + 4 * packs) * whole * 0.75 * 4


def test_a_prompt_for_all_its_answers() -> None:
    """8,192 and 128 prompt tokens and 8 answers of 512: 5.9 times less, clips of 64 x 16 x 32 patches."""
    plan = plan_of(["experiment=video_ktr_7b"])
    work = dataclasses.replace(
        plan.work, video_tokens=8192, text_tokens=128, answer_tokens=512, grid=(64, 16, 32)
    )
    separate = flops_of(plan, dataclasses.replace(work, shared=False))
    shared = flops_of(plan, work)
    clips = vision_flops(plan.model.vision, work.grid).linear * work.prompts
    text = (separate.old.linear - 8 * clips) / (shared.old.linear - clips)
    assert text == pytest.approx(8 * 8832 / (8319 + 8 * 512))
    assert separate.old.total / shared.old.total == pytest.approx(5.9, rel=0.05)
    assert shared.update.total < 0.25 * separate.update.total


def flops_of(plan: Plan, work: Workload) -> StepFlops:
    config = compose_config(["experiment=video_ktr_7b"])
    return step_flops(plan.model, work, 3, batches_of(config, work, plan.pools))


def test_what_the_other_way_would_cost(seven_billion: Plan) -> None:
    """Either value of keytoken.prefix says the same of the other one."""
    separate = plan_of(["experiment=video_ktr_7b", "keytoken.prefix=separate"])
    assert seven_billion.other == separate.flops and separate.other == seven_billion.flops
    divided = "operations of scoring by 3.11 and of the update by 3.36"
    for plan, said in ((seven_billion, "Sharing prompts divides"), (separate, "would divide")):
        last = " ".join(report(plan, with_assumptions=False).split())
        assert divided in last and said in last
    verl = plan_of(["experiment=video_ktr_7b", "keytoken.prefix=separate", "keytoken.kernels.head=verl"])
    assert "keytoken.prefix=shared keytoken.kernels.head=fused" in report(verl)


def test_separate_passes_by_hand() -> None:
    """The figures that plans had before answers shared prompts."""
    plan = plan_of(["experiment=video_ktr_7b", "keytoken.prefix=separate", f"{TOKENS}=20480"])
    assert plan.flops.old.total == pytest.approx(6_933e12, rel=1e-4)
    assert plan.flops.views["masked"].total == pytest.approx(2_332e12, rel=1e-3)
    assert plan.flops.update.total == pytest.approx(25_931e12, rel=1e-4)
    packs = -(-64 * (1260 + 361) // 20480)
    assert plan.traffic.gathers == (2 * packs + 4 * packs) * 2 * 8_292_166_656 * 0.75 * 4
    assert plan.traffic.media_got == plan.traffic.media_put * 5  # four actors and one scorer
    assert plan.memory["actor"].parts["activations"] == pytest.approx(12.9 * 2**30, rel=0.01)
    assert plan.step.seconds == pytest.approx(72.3, abs=0.05)
    assert not plan.warnings


def test_pixels_of_shared_prompts_go_to_one_rank_of_each_pool(seven_billion: Plan) -> None:
    traffic = seven_billion.traffic
    assert traffic.media_got == 2 * traffic.media_put
    cut = plan_of(["experiment=video_ktr_7b", "trainer.nnodes=16"])  # 64 actors with 4 answers each
    assert cut.traffic.media_got == 3 * cut.traffic.media_put


def test_the_masked_view_has_no_clip(seven_billion: Plan) -> None:
    views, work = seven_billion.flops.views, seven_billion.work
    assert list(views) == ["real", "masked", "shuffled"]
    assert views["real"] == views["shuffled"] == seven_billion.flops.old
    assert views["masked"].linear == pytest.approx(
        2
        * 256
        * ((work.text_tokens - 1) / 8 + 361)
        * seven_billion.model.text.layers
        * 3584
        * (7168 + 1024 + 2 * 18944)
    )


def test_times_by_hand(seven_billion: Plan) -> None:
    given, step = seven_billion.given, seven_billion.step
    old = step.of("old log-probs")
    assert old is not None
    peak = 4 * DEVICES["h100"].tflops * 1e12 * given.forward_efficiency
    assert old.seconds == pytest.approx(seven_billion.flops.old.total / peak) and old.bound == "arithmetic"
    views = [part for part in step.parts if part.name.startswith("view")]
    assert sum(part.seconds for part in views) == pytest.approx(step.busy["attribution"])
    trained = step.busy["attribution"] + step.busy["actor"] - old.seconds  # the passes outlast the log-probs
    ends = sum(part.seconds for part in step.parts if part.pool == "all")
    assert step.seconds == pytest.approx(step.busy["rollout"] + trained + ends)
    assert step.limit == "attribution"


def test_one_step_off_hides_the_shorter_side(seven_billion: Plan) -> None:
    ahead = plan_of(["experiment=video_ktr_7b", "trainer.v1.separate_async.num_warmup_batches=1"])
    assert ahead.pools.ahead and not seven_billion.pools.ahead
    hidden = seven_billion.step.seconds - ahead.step.seconds
    assert hidden == pytest.approx(seven_billion.step.busy["rollout"])


def test_twice_the_scorers_take_half_the_time(seven_billion: Plan) -> None:
    two = plan_of(["experiment=video_ktr_7b", "keytoken.attribution.num_workers=2"])
    assert two.step.busy["attribution"] == pytest.approx(seven_billion.step.busy["attribution"] / 2)


def test_small_batches_wait_for_layers() -> None:
    """On 32 ranks a score of 8 answers each gathers 16 GB for little arithmetic."""
    slow = plan_of(["experiment=video_ktr_7b", "pools=eight_nodes", "plan.network_gb_s=1"])
    part = slow.step.of("update")
    assert part is not None and part.bound == "gathering"


def test_what_does_not_fit_is_said_with_its_remedy() -> None:
    tight = plan_of(["experiment=video_ktr_7b", "trainer.n_gpus_per_node=2"])
    assert any(text.startswith("actor: 8") and "more actor GPUs" in text for text in tight.warnings)
    full = plan_of(
        [
            "experiment=video_ktr_qwen3_vl_8b",
            "data.train_batch_size=256",
            "keytoken.attribution.num_workers=8",
        ]
    )
    assert any("answers at once and is asked for" in text for text in full.warnings)
    longer = ["actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768"]
    verl = plan_of(
        ["experiment=video_ktr_7b", "keytoken.kernels.head=verl", "keytoken.prefix=separate", *longer]
    )
    assert any("smaller micro-batches" in text for text in verl.warnings)


def test_a_device_and_other_assumptions() -> None:
    plan = plan_of(["experiment=video_ktr_7b", "plan.device=h200", "plan.answer_share=1"])
    assert plan.work.answer_tokens == 768
    assert plan.memory["actor"].room == 141 * 2**30
    assert "* plan.device=h200" in report(plan)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("plan.gpu=h100", "Unknown key plan.gpu|key plan.gpu"),
        ("plan.device=h1000", "h100"),
        ("plan.host_gb_s=fast", "positive number"),
        ("plan.text_tokens=-3", "positive whole number"),
        ("plan.text_tokens", "has no value"),
    ],
)
def test_wrong_assumptions(word: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        plan_of(["experiment=video_ktr_7b", word])


def test_every_assumption_has_its_reason() -> None:
    for field in dataclasses.fields(Assumptions):
        assert len(field.metadata["why"]) > 8, field.name


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=video_ktr_3b", "pools=two_nodes"]) == 0
    page = capsys.readouterr().out
    for words in (
        "3.75 billion parameters",
        "8 actor, 4 rollout",
        "view: masked",
        "steps an hour",
        "plan.device=h100",
    ):
        assert words in page
    assert max(map(len, page.splitlines())) <= 160
    assert main(["plan", "experiment=video_ktr_3b", "pools=two_nodes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 3_754_622_976 and found["step"]["seconds"] > 0
    assert found["memory"]["actor"]["parts"]["optimizer"] == 8 * 3_754_622_976 / 8


def test_failures_and_checkpoints_by_hand(seven_billion: Plan) -> None:
    """8 GPUs of 50,000 hours each, 99.5 GB to a disk of 5 GB/s, and Young's rule."""
    limits, step = seven_billion.limits, seven_billion.step.seconds
    assert limits.failure_hours == 6250
    assert limits.checkpoint_s == pytest.approx(12 * 8_292_166_656 / 5e9)
    best = (2 * limits.checkpoint_s * 6250 * 3600) ** 0.5
    assert limits.checkpoint_steps == round(best / step)
    lost = limits.checkpoint_s / best + best / 2 / (6250 * 3600) + 300 / (6250 * 3600)
    assert limits.lost_share == pytest.approx(lost, rel=0.01)


def test_readers_that_cannot_keep_up() -> None:
    """2,048 clips of 0.3 s for two readers, in a step shorter than that."""
    words = ["experiment=video_ktr_7b", "pools=eight_nodes", "data.train_batch_size=2048", "plan.device=b200"]
    plan = plan_of([*words, "actor_rollout_ref.rollout.agent.num_workers=2"])
    assert plan.limits.decode_s == pytest.approx(2048 * 0.3 / 2) and plan.limits.decode_s > plan.step.seconds
    assert any(text.startswith("clips: 2 workers") for text in plan.warnings)
    enough = plan_of([*words, f"actor_rollout_ref.rollout.agent.num_workers={plan.limits.decode_workers[1]}"])
    assert not enough.warnings


def test_the_picture_shows_the_step(seven_billion: Plan, tmp_path: Path) -> None:
    """Nothing begins before what it waits for, and the last part ends with the step."""
    found = {part.name: (start, start + part.seconds) for part, start in spans(seven_billion)}
    assert found["view: real"][0] == found["old log-probs"][0] == found["decode"][1]
    assert found["reference"][0] == found["view: shuffled"][1]
    assert found["overhead"][1] == pytest.approx(seven_billion.step.seconds)
    draw(seven_billion, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    with pytest.raises(ConfigurationError, match=r"\.png or \.svg"):
        draw(seven_billion, tmp_path / "plan.txt.nothing")
