"""The main job on the real stack: three pools, several ranks, both placements, resume, repeatability."""

import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keytoken.data.contract import SamplingContract
from keytoken.demo.tokenizer import build_tokenizer
from keytoken.verl_adapter.export import SCHEMA

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

# Of a demo clip as the processor hands it on: 8 frames of 56 x 56 pixels in three colors, float32.
PIXEL_BYTES = 8 * 56 * 56 * 3 * 4
SCORES = ("log_prob", "log_prob_masked", "log_prob_shuffled", "visual", "temporal", "entropy")


def largest_difference(one: pd.DataFrame, other: pd.DataFrame, column: str) -> float:
    pairs = zip(one[column], other[column], strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max(initial=0.0)) for a, b in pairs)


def assert_same_answers(one: pd.DataFrame, other: pd.DataFrame) -> None:
    assert one["prompt_id"].tolist() == other["prompt_id"].tolist()
    assert one["prompt"].tolist() == other["prompt"].tolist()
    assert [ids.tolist() for ids in one["token_ids"]] == [ids.tolist() for ids in other["token_ids"]]


def media_of(run, step: int) -> tuple[float, float]:
    """Bytes of pixels that were put and got in a step, in copies of what its video prompts have."""
    tokens, metrics = run.tokens(step), run.metrics()[step - 1]
    assert metrics["data/media_held_bytes"] == 0  # nothing is left behind
    copy = PIXEL_BYTES * tokens[~tokens["prompt"].str.contains("plus")]["prompt_id"].nunique()
    return metrics["data/media_put_bytes"] / copy, metrics["data/media_got_bytes"] / copy


def test_three_pools_train(straight):
    steps = straight.metrics()
    assert len(steps) == 4
    for step in steps:
        # The attribution group holds the actor's weights after every sync: same log-probs.
        assert step["attribution/base_gap_max"] <= 1e-5
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert 0.2 <= step["attribution/selected_share"] < 0.9
        assert step["actor/grad_norm"] > 0
    before, after = straight.weights(2), straight.weights(4)
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    assert moved > 1e-4


def test_a_run_on_one_machine_listens_on_loopback(straight):
    """Ray, vLLM's server, the data plane, the weight transport; torch binds its stores to all interfaces."""
    with_a_store = (
        "ray::WorkerDict",
        "ray::AttributionWorker",
        "ray::CheckpointEngineWorker",
        "VLLM::Worker",
    )
    outside = [(title, ip) for title, ip in straight.listening if ip.split(":")[-1] != "127.0.0.1"]
    assert len(straight.listening) - len(outside) > 20
    assert [each for each in outside if not each[0].startswith(with_a_store)] == []
    assert len(outside) <= len(with_a_store)


def test_the_parity_gate_asks_a_video_and_a_text_before_the_first_step(straight):
    first, *others = straight.metrics()
    assert first["parity/prompts"] == 2
    assert 0 < first["parity/log_prob_gap_mean"] < 2e-3
    assert first["parity/log_prob_gap_max"] < 2e-2 and first["parity/attribution_gap_max"] <= 1e-5
    assert first["parity/seconds"] > 0
    assert not any("parity/prompts" in step for step in others)  # not due again
    for step in straight.metrics():  # engine and actor in every step
        assert 0 < step["parity/rollout_gap_mean"] < 2e-3 and step["parity/rollout_gap_max"] < 2e-2


def test_pixels_travel_once_for_a_prompt(straight):
    """One copy is stored; the actor, which also is the reference, gets one, the attribution group another."""
    assert [media_of(straight, step) for step in (1, 2, 3, 4)] == [(1.0, 2.0)] * 4


def test_answer_length_is_the_real_length(straight):
    tokens = straight.tokens(1)
    mean = np.mean([len(ids) for ids in tokens["token_ids"]])
    assert straight.metrics()[0]["response_length/mean"] == pytest.approx(mean)


def test_export_has_the_documented_schema(straight):
    tokens = straight.tokens(1)
    assert list(tokens.columns) == SCHEMA.names
    assert len(tokens) == 16
    for row in tokens.itertuples():
        for column in ("tokens", "log_prob", "entropy", "weight", "advantage", "selected_entropy"):
            assert len(getattr(row, column)) == len(row.token_ids)
        assert set(np.unique(row.weight)) <= {0.0, 1.0}


def test_text_prompts_have_no_visual_score(straight):
    tokens = pd.concat([straight.tokens(step) for step in (1, 2, 3, 4)])
    text = tokens[tokens["prompt"].str.contains("plus")]
    video = tokens[~tokens["prompt"].str.contains("plus")]
    assert len(text) and len(video)
    assert max(np.abs(row).max() for row in text["visual"]) == 0.0
    assert max(np.abs(row).max() for row in text["temporal"]) == 0.0
    assert max(np.abs(row).max() for row in video["visual"]) > 1e-3


def test_a_job_that_loses_a_process_goes_on_as_if_nothing_had_happened(launcher, straight, cluster):
    """Kill a worker after the checkpoint of step 2: the job's second try makes the same steps 3 and 4.

    The same prompts, answers and log-probs in step 3 mean that weights, sampling and data position were
    restored; the same weights after step 4 mean that the optimizer was.
    """
    restarts = ("--address", cluster.address, "--max-restarts=1", "--restart-delay=2", f"--source={ROOT}")
    job = launcher.start(
        "interrupted",
        "trainer.total_training_steps=4",
        "trainer.save_freq=2",
        program=("-m", "keytoken.cli", "submit", *restarts),
        environment=cluster.client,
    )
    marker = job.run.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    job.wait_for(lambda: marker.exists() and marker.read_text().strip() == "2")
    (attribution,) = cluster.processes("ray::AttributionWorker")
    attribution.kill()
    resumed = job.finish()
    log = job.log.read_text(errors="replace")
    assert "The process of AttributionWorker (pid" in log and "Try 1 of 1" in log

    assert [int(step["training/global_step"]) for step in resumed.metrics()] == [3, 4]
    first = resumed.weights(2)
    assert all(torch.equal(first[name], value) for name, value in straight.weights(2).items())
    contracts = [folder / "sampling_contract.json" for folder in (resumed.folder, resumed.checkpoint(2))]
    assert SamplingContract.read(contracts[0]) == SamplingContract.read(contracts[1])
    for step in (3, 4):
        assert_same_answers(straight.tokens(step), resumed.tokens(step))
        for column in SCORES:
            assert largest_difference(straight.tokens(step), resumed.tokens(step), column) == 0.0
    last = resumed.weights(4)
    assert all(torch.equal(last[name], value) for name, value in straight.weights(4).items())


@pytest.fixture(scope="module")
def two_ranks(launcher):
    """Two steps of Video-KTR, then two of TW-GRPO, on two actor ranks and two attribution ranks."""
    return launcher.tour(
        "two_ranks",
        ["video_ktr", "tw_grpo"],
        "trainer.n_gpus_per_node=2",
        "keytoken.attribution.num_workers=2",
        "trainer.save_freq=-1",
    )


def test_two_actor_ranks_and_two_attribution_ranks(two_ranks, straight):
    assert two_ranks.metrics()[0]["parity/attribution_gap_max"] <= 1e-5
    for step in two_ranks.metrics():
        assert step["attribution/base_gap_max"] <= 1e-5
        assert step["training/rollout_actor_probs_pearson_corr"] > 0.999
    assert_same_answers(straight.tokens(1), two_ranks.tokens(1))
    for column in SCORES:
        assert largest_difference(straight.tokens(1), two_ranks.tokens(1), column) <= 1e-5
    for put, got in (media_of(two_ranks, 1), media_of(two_ranks, 2)):
        assert put == 1.0 and 2.0 <= got <= 4.0  # the answers to a prompt may lie in the shares of both ranks
    one, two = straight.metrics()[0], two_ranks.metrics()[0]
    assert two["actor/grad_norm"] == pytest.approx(one["actor/grad_norm"], rel=1e-4)


def test_answers_that_are_compared_meet_on_one_of_two_ranks(two_ranks):
    """TW-GRPO gives all answers to a prompt one weight at a position, if none of them was compared elsewhere.

    The batch is balanced by length, so that answers to a prompt lie in the shares of both ranks.
    """
    for step in (3, 4):
        groups = [group["weight"].tolist() for _, group in two_ranks.tokens(step).groupby("prompt_id")]
        assert [len(group) for group in groups] == [4] * 4
        for group in groups:
            longest = max(group, key=len)
            assert all(weights == pytest.approx(longest[: len(weights)], rel=1e-5) for weights in group)
            assert min(longest) == pytest.approx(1.0) and max(longest) > 1.4


def test_placement_actor_gives_the_same_scores(launcher, straight):
    run = launcher.run(
        "one_device",
        "pools=one_device",
        "trainer.val_before_train=true",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.logger=[console,file,tensorboard]",
    )
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    for name in ("lens/answer_1", "lens/answer_2"):
        assert [image.step for image in events.Images(name)] == [1, 2]
    first, *_ = events.Scalars("export/pictures_s")
    assert first.value == pytest.approx(run.metrics()[0]["export/pictures_s"])
    # Seven held-out prompts, each with four sampled answers and a greedy one in the same batch of the engine;
    # six of them have a clip, and are asked with blank and with shuffled frames as well.
    assert len(run.validation(0)) == 47
    assert run.validation(0) == straight.validation(0)
    assert run.metrics()[0]["parity/log_prob_gap_max"] < 2e-2
    assert run.metrics()[0]["parity/attribution_gap_max"] <= 1e-5
    assert_same_answers(straight.tokens(1), run.tokens(1))
    assert [media_of(run, step) for step in (1, 2)] == [(1.0, 1.0)] * 2  # one process does it all
    for column in SCORES:
        assert largest_difference(straight.tokens(1), run.tokens(1), column) <= 1e-5
    assert run.metrics()[0]["actor/grad_norm"] == pytest.approx(
        straight.metrics()[0]["actor/grad_norm"], rel=1e-4
    )


def test_a_prompt_for_each_answer_gives_the_same_run(launcher, straight):
    """``keytoken.prefix=separate`` beside the default, whose answers share their prompts' computation."""
    run = launcher.run(
        "separate", "keytoken.prefix=separate", "trainer.total_training_steps=4", "trainer.save_freq=-1"
    )
    for step, (ours, theirs) in enumerate(zip(run.metrics(), straight.metrics(), strict=True), start=1):
        assert_same_answers(straight.tokens(step), run.tokens(step))
        for column in SCORES:
            difference = largest_difference(straight.tokens(step), run.tokens(step), column)
            print(step, column, difference)
            assert difference <= (1e-5 if step == 1 else 1e-3), (step, column)
        for name in ("actor/grad_norm", "actor/policy_loss", "attribution/selected_share"):
            print(step, name, ours[name], theirs[name])
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4 if step == 1 else 1e-2), (step, name)


@pytest.fixture(scope="module")
def order_and_reuse(launcher):
    """Two steps of T-GRPO, then four of Video-KTR in which the views are scored in every second step."""
    reuse = "video_ktr keytoken.attribution.every_steps=2"
    return launcher.tour("order_and_reuse", ["t_grpo", reuse, reuse], "trainer.save_freq=-1")


def test_t_grpo_pays_for_the_order_of_frames(order_and_reuse, straight):
    """Two answers to a video prompt see shuffled frames: they decide if right answers earn 0.3, and go."""
    assert_same_answers(straight.tokens(1), order_and_reuse.tokens(1))
    tokenizer, num_paid = build_tokenizer(), 0
    for step, metrics in enumerate(order_and_reuse.metrics()[:2], start=1):
        tokens = order_and_reuse.tokens(step)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens["token_ids"]]
        tokens["accuracy"] = [zlib.crc32(text.encode()) % 11 / 10 for text in texts]  # reward.py
        paid, means = 0, []
        groups = [group for _, group in tokens.groupby("prompt_id")]
        assert [group["answer"].tolist() for group in groups] == [[0, 1, 2, 3]] * 4
        for group in groups:
            bonus, right = group["reward"] - group["accuracy"], group["accuracy"] > 0.1
            is_video, is_paid = "plus" not in group["prompt"].iloc[0], bonus.max() > 0.15
            assert is_video or not is_paid
            assert bonus.tolist() == pytest.approx((0.3 * is_paid * right).tolist(), abs=1e-6)
            paid += is_paid
            means += [group["accuracy"].mean()] * is_video
        assert metrics["reward/order_bonus_share"] == pytest.approx(paid / len(means))
        assert metrics["reward/ordered_accuracy"] == pytest.approx(np.mean(means))
        assert 0.0 <= metrics["reward/shuffled_accuracy"] <= 1.0
        assert metrics["critic/rewards/mean"] == pytest.approx(tokens["reward"].mean())
        num_paid += paid
    assert num_paid > 0


def test_scores_are_reused_between_the_passes(order_and_reuse):
    """The views are scored in steps 3 and 5; in between a token id scores what it scored on average."""
    steps = order_and_reuse.metrics()
    assert [step["attribution/scored"] for step in steps[2:]] == [1.0, 0.0, 1.0, 0.0]
    assert all(step["actor/grad_norm"] > 0 for step in steps)
    means: dict[int, list[float]] = {}
    for row in order_and_reuse.tokens(3).itertuples():
        if "plus" not in row.prompt:  # texts have no visual score
            for token, score in zip(
                row.token_ids, np.subtract(row.log_prob, row.log_prob_masked), strict=True
            ):
                means.setdefault(int(token), []).append(float(score))
    second = order_and_reuse.tokens(4)
    assert second["log_prob_masked"].isna().all()  # nothing was measured, and the export does not pretend
    for row in second[~second["prompt"].str.contains("plus")].itertuples():
        expected = [abs(float(np.mean(means.get(int(token), [0.0])))) for token in row.token_ids]
        assert row.visual == pytest.approx(expected, abs=1e-5)


def test_one_step_off_samples_beside_scoring_and_update(launcher):
    """Answers are made while the step before is trained on; all else goes by the weights of now."""
    run = launcher.run(
        "ahead", "trainer.total_training_steps=4", "trainer.v1.separate_async.num_warmup_batches=1"
    )
    steps = run.metrics()
    oldest = [step["training/off_policy/trajectory_staleness_worst/max"] for step in steps]
    assert oldest == [0.0, 1.0, 1.0, 1.0]
    assert all(step["attribution/base_gap_max"] <= 1e-5 for step in steps)
    assert all(step["attribution/selected_share"] > 0.0 for step in steps)
