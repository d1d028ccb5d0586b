"""The parity gate: the running groups are asked the same prompts, and have to agree (:mod:`keytoken.parity`).

A few prompts of the training data take the way that every prompt takes. Agent loop and engine answer them,
the actor scores the answers by the pass that makes old log-probs, the attribution group by its own passes.
All answers to a prompt have one seed, so they are alike: a prompt alone makes a batch of rows of equal length
and of one kind, all prompts together a ragged one, and every rank and every replica gets its share.

- The engine says itself what it made of the requests (:mod:`keytoken.verl_adapter.engine_probe`).
- No token that an answer may not hold is sampled, although the requests ask for all of them.
- A pass that crashes is a :class:`ParityError` which names it.

verl knows prompts to train on and prompts to validate with (verl 0.9.1, agent_loop_tq.py:122). These come as
such of a validation, which nobody else uses between two steps, and are cleared afterwards.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from keytoken.attribution.methods import needs_passes
from keytoken.errors import ClusterError, ParityError
from keytoken.parity import Bounds, Gap, Reading, compare, with_answer
from keytoken.verl_adapter import media
from keytoken.verl_adapter.agent_loop import ANSWER_VISION_TOKENS, PARITY_SAMPLING
from keytoken.verl_adapter.batch import PASS_INPUTS, read
from keytoken.verl_adapter.compat import (
    PPOTrainer,
    RolloutReplicaRegistry,
    collate_rows,
    tensordict_utils,
)
from keytoken.verl_adapter.keys import place_of
from keytoken.verl_adapter.parity_samples import Sample, choose_samples, gate_bounds
from keytoken.verl_adapter.shims.vision_tokens import vision_token_ids
from keytoken.workers.parity import READING, REAL, reading_of
from keytoken.workers.rows import rows_of

logger = logging.getLogger(__name__)

ENGINE, ACTOR, ATTRIBUTION = "vLLM engine", "actor", "attribution group"
PARTITION = "val"
_STORED = (*PASS_INPUTS, "extra_fields", "rollout_log_probs", "old_log_probs")
_POLL_S = 0.02
# The largest bias that vLLM takes: a token that is not masked is then sampled for certain.
_BIAS = 100.0


class ParityGate:
    """Asks the groups of a running trainer.

    Args:
        trainer: The trainer, with all groups running and ``agent_loop_manager`` set.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._settings = trainer.keytoken.parity
        self._bounds = gate_bounds(trainer.config, self._settings)
        self._samples = choose_samples(trainer.train_dataset, self._settings.prompts, trainer.keytoken.seed)
        self._num_asked = 0
        self._step = 0

    def check(self, step: int) -> dict[str, float]:
        """Ask all groups; they agree, or the run ends.

        Args:
            step: The last step that has been trained; 0 before the first.

        Returns:
            ``parity/log_prob_gap_max`` and ``parity/log_prob_gap_mean`` between engine and actor,
            ``parity/attribution_gap_max`` between actor and attribution group (nats), ``parity/prompts`` and
            ``parity/seconds``.

        Raises:
            ParityError: they do not.
            ClusterError: no answer came in time.
        """
        start = time.perf_counter()
        self._step = step
        self._num_asked += 1
        uids = [f"parity-{self._num_asked:04d}-{number:03d}" for number in range(len(self._samples))]
        try:
            keys, seen = self._answers(uids)
            with self._trainer._engine_at_rest(step):
                gaps = list(self._compare(keys, seen))
        finally:
            self._clear(uids)
        metrics = {
            "parity/log_prob_gap_max": max(gap.largest for party, gap in gaps if party == ENGINE),
            "parity/log_prob_gap_mean": float(np.mean([gap.mean for party, gap in gaps if party == ENGINE])),
            "parity/prompts": float(len(self._samples)),
            "parity/seconds": time.perf_counter() - start,
        }
        scored = [gap.largest for party, gap in gaps if party == ATTRIBUTION]
        if scored:
            metrics["parity/attribution_gap_max"] = max(scored)
        return metrics

    # ---- answers of the engine

    def _answers(self, uids: list[str]) -> tuple[list[list[str]], dict[int, list[dict[str, Any]]]]:
        """Keys of the answers to each prompt, and what the engine noted of each seed."""
        servers = [server for replica in self._replicas() for server in replica.servers]
        seeds = [sample.seed for sample in self._samples]
        ray.get([server.keytoken_watch.remote(seeds) for server in servers])
        self._submit(uids)
        keys = self._wait(uids)
        seen: dict[int, list[dict[str, Any]]] = {seed: [] for seed in seeds}
        for note in (
            note for notes in ray.get([s.keytoken_seen.remote() for s in servers]) for note in notes
        ):
            seen[note["seed"]].append(note)
        return keys, seen

    def _replicas(self) -> list[Any]:
        managers = self._trainer._rollout_server_managers()
        return [replica for manager in managers for replica in manager.get_replicas()]

    def _submit(self, uids: list[str]) -> None:
        trainer, count = self._trainer, len(uids)
        rows = collate_rows([trainer.train_dataset[sample.number] for sample in self._samples])
        rows["uid"] = np.array(uids, dtype=object)
        batch = tensordict_utils.get_tensordict(rows)
        assign = tensordict_utils.assign_non_tensor_stack
        assign(batch, "__rollout_n__", [self._num_answers()] * count)
        assign(batch, PARITY_SAMPLING, [self._sampling(sample) for sample in self._samples])
        tensordict_utils.assign_non_tensor_data(batch, "global_steps", self._step)
        tensordict_utils.assign_non_tensor_data(batch, "validate", True)
        tag = {"is_prompt": True, "status": "pending", "global_steps": self._step}
        tq.kv_batch_put(keys=uids, partition_id=PARTITION, tags=[dict(tag) for _ in uids])
        trainer.agent_loop_manager.generate_sequences(batch)

    def _num_answers(self) -> int:
        """To each prompt: at least two, as many as replicas, and equal shares for all ranks."""
        ranks = self._num_ranks()
        if self._trainer._own_pool:
            ranks = math.lcm(ranks, self._trainer.keytoken.attribution.num_workers)
        return ranks * math.ceil(max(2, len(self._replicas())) / ranks)

    def _num_ranks(self) -> int:
        """Of the actor, that share a batch."""
        return int(max(self._trainer.actor_rollout_wg._query_dispatch_info("actor"))) + 1

    def _sampling(self, sample: Sample) -> dict[str, Any]:
        """Of whole distributions, because the trainer's log-probs are such; end tokens end nothing."""
        rollout = self._trainer.config.actor_rollout_ref.rollout
        forbidden = vision_token_ids(self._trainer.processor)
        return {
            "seed": sample.seed,
            "temperature": float(rollout.temperature),
            "top_p": 1.0,
            "top_k": -1,
            "logprobs": True,
            "ignore_eos": True,
            "max_tokens": min(self._settings.answer_tokens, int(rollout.response_length)),
            "logit_bias": dict.fromkeys(forbidden, _BIAS),
        }

    def _wait(self, uids: list[str]) -> list[list[str]]:
        limit = self._trainer.keytoken.attribution.pass_timeout_s
        end = time.monotonic() + limit
        while True:
            tags = tq.kv_list(PARTITION).get(PARTITION, {})
            states = [tags[uid]["status"] for uid in uids]
            if all(state in ("finished", "failure") for state in states):
                break
            if time.monotonic() > end:
                raise ClusterError(
                    f"Parity: the engine did not answer {len(uids)} prompts within {limit:g} s; see the log "
                    "of the vLLM server. keytoken.attribution.pass_timeout_s is the limit."
                )
            time.sleep(_POLL_S)
        if "failure" in states:
            self._report_failure(self._samples[states.index("failure")])
        by_prompt: dict[str, list[str]] = {uid: [] for uid in uids}
        for key in sorted(set(tags) - set(uids)):
            if place_of(key)[0] in by_prompt:
                by_prompt[place_of(key)[0]].append(key)
        return list(by_prompt.values())

    def _report_failure(self, sample: Sample) -> None:
        workers = self._trainer.agent_loop_manager.agent_loop_workers
        reasons = ray.get([worker.last_failure.remote() for worker in workers])
        reason = next((reason for reason in reasons if reason), "see the log of the agent loop")
        raise ParityError(f"Parity: no answer to {sample.name} could be had: {reason}")

    # ---- passes over the answers

    def _compare(
        self, keys: list[list[str]], seen: dict[int, list[dict[str, Any]]]
    ) -> Iterator[tuple[str, Gap]]:
        """Each prompt in batches of its own, then all prompts in one."""
        for sample, own in zip(self._samples, keys, strict=True):
            yield from self._compare_rows([sample] * len(own), own, seen)
        everything = [(sample, key) for sample, own in zip(self._samples, keys, strict=True) for key in own]
        samples, flat = [sample for sample, _ in everything], [key for _, key in everything]
        if len(keys) > 1:
            yield from self._compare_rows(samples, flat, seen)
        if self._scores:
            for view in self._trainer.keytoken.method.views:
                self._attribution_pass(samples, flat, view)

    @property
    def _scores(self) -> bool:
        return needs_passes(self._trainer.keytoken.method)

    def _compare_rows(
        self, samples: Sequence[Sample], keys: list[str], seen: dict[int, list[dict[str, Any]]]
    ) -> Iterator[tuple[str, Gap]]:
        data = self._actor_pass(samples, keys)
        actors = self._actor_readings(samples, data)
        for row, (sample, actor) in enumerate(zip(samples, actors, strict=True)):
            for engine in self._engine_readings(sample, data, row, actor, seen[sample.seed]):
                yield ENGINE, compare(engine, actor, self._bounds, _vocabulary_hint(self._trainer, seen))
        if self._scores:
            tolerance = self._trainer.keytoken.attribution.base_tolerance
            bounds = Bounds(mean=tolerance, largest=tolerance)
            scored = self._attribution_pass(samples, keys, REAL)
            for sample, actor, found in zip(samples, actors, scored, strict=True):
                reading = Reading.of(ATTRIBUTION, self._name(sample), found)
                yield ATTRIBUTION, compare(actor, reading, bounds)

    def _name(self, sample: Sample) -> str:
        return f"{sample.name}, asked behind step {self._step}" if self._step else sample.name

    def _actor_pass(self, samples: Sequence[Sample], keys: list[str]) -> TensorDict:
        rollout, share = self._trainer.config.actor_rollout_ref.rollout, len(keys) // self._num_ranks()
        batch = KVBatchMeta(partition_id=PARTITION, keys=keys, tags=[{} for _ in keys])
        if not rollout.log_prob_use_dynamic_bsz:  # then verl takes rows in multiples of a micro-batch only
            limit = int(rollout.log_prob_micro_batch_size_per_gpu)
            size = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
            batch.extra_info["micro_batch_size_per_gpu"] = size
        try:
            # verl's own: that of the separate mode would save the weights of the old policy once more.
            PPOTrainer._compute_old_log_prob(self._trainer, batch, {})
        except ray.exceptions.RayTaskError as problem:  # a worker that died is another matter
            raise _crash("pass of old log-probs", ACTOR, samples, problem) from problem
        return read(batch, list(_STORED))

    def _attribution_pass(self, samples: Sequence[Sample], keys: list[str], run: str) -> list[dict[str, Any]]:
        request = KVBatchMeta(
            partition_id=PARTITION,
            keys=keys,
            tags=[{} for _ in keys],
            fields=list(PASS_INPUTS),
            extra_info={"global_step": self._step + 1, "parity_pass": run},
        )
        try:
            self._trainer.attribution_wg.read_parity(request)
        except ray.exceptions.RayTaskError as problem:  # a worker that died is another matter
            what = "pass over the real input" if run == REAL else f"pass over the view {run!r}"
            raise _crash(what, ATTRIBUTION, samples, problem) from problem
        return [_plain(found) for found in read(request, [READING])[READING]]

    # ---- readings

    def _actor_readings(self, samples: Sequence[Sample], data: TensorDict) -> list[Reading]:
        rows = zip(samples, rows_of(data), data["old_log_probs"].unbind(), strict=True)
        return [
            Reading.of(ACTOR, self._name(sample), {**reading_of(row), "log_probs": log_probs.tolist()})
            for sample, row, log_probs in rows
        ]

    def _engine_readings(
        self, sample: Sample, data: TensorDict, row: int, actor: Reading, notes: list[dict[str, Any]]
    ) -> Iterator[Reading]:
        """Of one answer: by every note of its prompt, of which there is one for each answer."""
        forbidden = _plain(data["extra_fields"][row])[ANSWER_VISION_TOKENS]
        if forbidden:
            raise ParityError(
                f"Parity: answer to {self._name(sample)} held {forbidden} vision tokens, which no later pass "
                f"can place: the {ENGINE} does not mask them. Its workers have to run KeyToken's shims "
                "(VERL_USE_EXTERNAL_MODULES=keytoken.verl_adapter.register)."
            )
        answer = actor.ids[actor.prompt_length :].tolist()
        log_probs = data["rollout_log_probs"].unbind()[row].tolist()
        if not notes:
            self._report_unseen(sample)
            own = {"ids": actor.ids.tolist(), "prompt_length": actor.prompt_length, "log_probs": log_probs}
            yield Reading.of(ENGINE, actor.sample, own)
        for note in notes:
            yield Reading.of(ENGINE, actor.sample, with_answer(note, answer, log_probs))

    def _report_unseen(self, sample: Sample) -> None:
        rollout = self._trainer.config.actor_rollout_ref.rollout
        what = f"Parity: the {ENGINE} noted no request for {self._name(sample)}"
        if int(rollout.data_parallel_size) == 1:
            raise ParityError(
                f"{what}: the sampling seed of the row did not reach it. An agent loop of your own has to "
                f"send the sampling parameters of row key {PARITY_SAMPLING!r}."
            )
        logger.warning("%s (of data-parallel engines only the first can be asked): log-probs only", what)

    def _clear(self, uids: list[str]) -> None:
        tags = tq.kv_list(PARTITION).get(PARTITION, {})
        owners = set(uids)
        keys = [key for key in tags if key in owners or place_of(key)[0] in owners]
        if keys:
            tq.kv_clear(keys=keys, partition_id=PARTITION)
        media.clear_prompts(uids)
        media.release_media()
        for group in self._trainer._groups():
            group.release_media()


def use_probed_engine() -> None:
    """Have verl start engines that can be asked, under the name of those it would start."""

    def load() -> Any:
        from keytoken.verl_adapter.probed_server import ProbedReplica  # imports vLLM's server

        return ProbedReplica

    RolloutReplicaRegistry.register("vllm", load)


def _plain(value: Any) -> dict[str, Any]:
    return dict(getattr(value, "data", value))


def _vocabulary_hint(trainer: Any, seen: dict[int, list[dict[str, Any]]]) -> list[str]:
    sizes = {note["vocabulary"] for notes in seen.values() for note in notes}
    known = len(trainer.tokenizer)
    if not sizes or max(sizes) <= known:
        return []
    return [
        f"The model's head has {max(sizes)} tokens, its tokenizer {known}: the engine never samples the "
        "others, the trainer counts their probability. If all differences have one sign, cut the head to the "
        "tokenizer's length."
    ]


def _crash(what: str, party: str, samples: Sequence[Sample], problem: BaseException) -> ParityError:
    cause: BaseException = problem
    while isinstance(cause, ray.exceptions.RayTaskError) and isinstance(cause.cause, BaseException):
        cause = cause.cause
    names = "; ".join(dict.fromkeys(sample.name for sample in samples))
    return ParityError(
        f"Parity: the {what} of the {party} crashed with {type(cause).__name__}: {cause}. Rows: {names}. Its "
        "traceback is above; training would have met it later."
    )
