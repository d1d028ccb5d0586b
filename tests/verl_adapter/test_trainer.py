"""What the trainer reads from verl's configuration; its steps run in tests/e2e."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from ray.exceptions import ActorDiedError, GetTimeoutError
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken import fields
from keytoken.golden import load_preset
from keytoken.schema import AttributionConfig, DiagnosticsConfig, KeyTokenConfig, OrderBonusConfig
from keytoken.verl_adapter import order, stand_in
from keytoken.verl_adapter import trainer as trainers
from keytoken.verl_adapter.trainer import AttributionSteps, _reward_field


@pytest.mark.parametrize(
    ("estimator", "kl_in_reward", "field"),
    [
        ("keytoken_grpo", False, "rm_scores"),
        ("keytoken_grpo", True, "token_level_rewards"),  # verl writes them with the KL taken off
        ("rloo", False, None),
        ("reinforce_plus_plus", True, None),
    ],
)
def test_rewards_are_read_for_the_own_estimator_only(
    estimator: str, kl_in_reward: bool, field: str | None
) -> None:
    algorithm = OmegaConf.create({"adv_estimator": estimator, "use_kl_in_reward": kl_in_reward})
    assert _reward_field(algorithm) == field


class Stop(Exception):
    """Ends a step where the test has seen enough."""


class VerlsTrainer:
    """Stands where verl's trainer stands below ours."""

    def _fetch_one_gen_batch(self) -> TensorDict:
        return TensorDict({"index": torch.arange(2)}, batch_size=2)

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        raise Stop(dict(metrics))


def trainer(order_bonus: OrderBonusConfig | None) -> Any:
    built = object.__new__(type("Trainer", (AttributionSteps, VerlsTrainer), {}))
    built.keytoken = SimpleNamespace(method=SimpleNamespace(order_bonus=order_bonus))
    built.config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 4}}})
    built.global_steps = 3
    return built


def test_prompts_of_a_step_ask_for_shuffled_answers_if_the_method_does() -> None:
    plain = trainer(None)._fetch_one_gen_batch()
    asking = trainer(OrderBonusConfig())._fetch_one_gen_batch()
    assert plain["uid"] == asking["uid"] == ["0000003-00000", "0000003-00001"]
    assert order.SHUFFLED_ANSWERS not in plain.keys()  # noqa: SIM118 - a TensorDict is no dict
    assert asking[order.SHUFFLED_ANSWERS] == [2, 2]


def test_rewards_are_raised_before_advantages_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.order, "raise_rewards", lambda batch, config: {"bonus": config.bonus})
    batch = KVBatchMeta(partition_id="train", keys=[], tags=[])
    for bonus, seen in ((OrderBonusConfig(bonus=0.5), {"bonus": 0.5}), (None, {})):
        with pytest.raises(Stop) as stopped:
            trainer(bonus)._compute_advantage(batch, {})
        assert stopped.value.args == (seen,)


VIEW = fields.view_outputs("masked")
ALWAYS = {fields.VERSION, fields.PASS_SECONDS, fields.STATIC_CLIP}


def seconds(*passes: str) -> set[str]:
    return set(map(fields.pass_seconds, passes))


@pytest.mark.parametrize(
    ("preset", "check_base", "outputs"),
    [
        ("grpo", True, set()),
        ("high_entropy", True, set()),
        ("papo_grpo", False, {*ALWAYS, *seconds("blackened"), *fields.view_outputs("blackened")}),
        (
            "tor_grpo",
            True,
            {*ALWAYS, *seconds("real", "masked"), fields.REAL_LOG_PROB, fields.TRUNCATED_ENTROPY, *VIEW},
        ),
        ("tor_grpo", False, {*ALWAYS, *seconds("real", "masked"), fields.TRUNCATED_ENTROPY, *VIEW}),
        ("tw_grpo", False, {*ALWAYS, *seconds("real"), fields.DISAGREEMENT}),
    ],
)
def test_what_the_passes_of_a_method_write(preset: str, check_base: bool, outputs: set[str]) -> None:
    attribution = AttributionConfig(check_base=check_base)
    keytoken = KeyTokenConfig(method=load_preset(preset), attribution=attribution)
    found = trainers._outputs_of(keytoken, step=4)
    assert set(found) == outputs and len(found) == len(outputs)


@pytest.mark.parametrize("check_base", [False, True])
@pytest.mark.parametrize("preset", ["grpo", "papo_grpo", "tw_grpo"])
def test_a_step_with_diagnostics_measures_more(preset: str, check_base: bool) -> None:
    """In the steps that are due, and for a method without passes as well."""
    plain = KeyTokenConfig(method=load_preset(preset), attribution=AttributionConfig(check_base=check_base))
    keytoken = dataclasses.replace(plain, diagnostics=DiagnosticsConfig(every_steps=2))
    assert trainers._outputs_of(keytoken, step=3) == trainers._outputs_of(plain, step=3)
    more = set(trainers._outputs_of(keytoken, step=4)) - set(trainers._outputs_of(plain, step=4))
    wanted = {fields.COLLISION}
    if preset == "grpo":
        wanted |= ALWAYS | ({fields.REAL_LOG_PROB} if check_base else set())
    if preset == "grpo" or (preset == "papo_grpo" and not check_base):
        wanted |= seconds("real")
    assert more == wanted


@pytest.mark.parametrize(
    ("preset", "prefix", "asked"),
    [
        ("grpo", "shared", None),
        ("video_ktr", "separate", ["b_0_0", "a_0_0", "b_1_0", "a_1_0"]),
        ("video_ktr", "shared", ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]),  # a prompt for each of the two ranks
        ("tw_grpo", "separate", ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]),
    ],
)
def test_passes_are_asked_for_views_and_for_measures(
    preset: str, prefix: Any, asked: list[str] | None
) -> None:
    requests: list[KVBatchMeta] = []

    def compute_attribution(request: KVBatchMeta) -> Any:
        requests.append(request)
        return SimpleNamespace(futures=["future"])

    built = trainer(None)
    built.keytoken = KeyTokenConfig(method=load_preset(preset), prefix=prefix)
    built.attribution_wg = SimpleNamespace(world_size=2, compute_attribution=compute_attribution)
    built._result_of = lambda futures, what: futures
    keys = ["b_0_0", "a_0_0", "b_1_0", "a_1_0"]
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{}] * 4)
    metrics: dict[str, Any] = {}
    assert built._compute_old_log_prob(batch, metrics).keys == keys
    assert [request.keys for request in requests] == ([] if asked is None else [asked])
    assert ("attribution/wait_s" in metrics) == (asked is not None)
    assert built._own_pool == (asked is not None)


def test_diagnostics_ask_for_a_pass_where_the_method_does_not() -> None:
    requests: list[KVBatchMeta] = []
    built = trainer(None)
    built.keytoken = KeyTokenConfig(
        method=load_preset("grpo"), diagnostics=DiagnosticsConfig(every_steps=built.global_steps)
    )
    built.attribution_wg = SimpleNamespace(
        world_size=1,
        compute_attribution=lambda request: requests.append(request) or SimpleNamespace(futures=[]),
    )
    built._result_of = lambda futures, what: futures
    batch = KVBatchMeta(partition_id="train", keys=["a_0_0"], tags=[{}])
    built._compute_old_log_prob(batch, {})
    built.global_steps += 1
    built._compute_old_log_prob(batch, {})
    assert [request.extra_info["global_step"] for request in requests] == [3]
    assert not built._own_pool


class Worker:
    """Answers Ray's question whether it is there, or does not any more."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.__ray_ready__ = self

    def remote(self) -> Worker:
        return self


@pytest.mark.parametrize(
    ("on_failure", "errors", "asked"),
    [
        ("actor", [None, ActorDiedError()], ["group", "actor"]),
        ("actor", [None, None], ["group"]),
        ("actor", [None, GetTimeoutError()], ["group"]),  # busy is not dead
        ("stop", [ActorDiedError()], ["group"]),
    ],
)
def test_who_stands_in_and_when(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_failure: str,
    errors: list[Exception | None],
    asked: list[str],
) -> None:
    """Only for processes of the group that are dead; its others are ended then, and it is said once."""

    def get(worker: Worker, timeout: float) -> None:
        if worker.error is not None:
            raise worker.error

    killed: list[Worker] = []
    monkeypatch.setattr(stand_in.ray, "get", get)
    monkeypatch.setattr(stand_in.ray, "kill", killed.append)
    built = trainer(None)
    attribution = AttributionConfig(on_failure=on_failure)
    built.keytoken = KeyTokenConfig(method=load_preset("video_ktr"), attribution=attribution)
    built._own_broadcast = object() if on_failure == "actor" else None
    group = SimpleNamespace(name="group", workers=[Worker(error) for error in errors])
    built.attribution_wg, built.actor_rollout_wg = group, SimpleNamespace(name="actor")
    seen: list[str] = []

    def question() -> str:
        seen.append(built.attribution_wg.name)
        if seen[-1] == "group":
            raise ActorDiedError()
        return "answer"

    if len(asked) == 2:
        assert built._ask(question) == "answer"
        assert killed == group.workers and built._stand_in_metrics() == {"attribution/on_actor": 1.0}
        assert built._ask(question) == "answer" and caplog.text.count("the attribution group is lost") == 1
        assert seen == ["group", "actor", "actor"]
    else:
        with pytest.raises(ActorDiedError):
            built._ask(question)
        expected = {"attribution/on_actor": 0.0} if on_failure == "actor" else {}
        assert seen == asked and killed == [] and built._stand_in_metrics() == expected
