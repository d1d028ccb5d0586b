"""The estimator as verl calls it, against verl's own GRPO."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from keytoken.attribution.types import Outcomes, Signals
from keytoken.errors import KernelError
from keytoken.validate import ESTIMATORS
from keytoken.verl_adapter.advantage import NAME, grpo_advantages, install_estimator, require_same
from keytoken_kernels.selection import Segments, Signal, select

# isort: split
from verl import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories


def ragged_batch(sizes: list[int], seed: int = 0) -> tuple[DataProto, list[str]]:
    """Interleaved groups of the given sizes, answers of 1 to 9 tokens, the reward on the last token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [f"prompt-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    order = torch.randperm(len(prompts), generator=generator)
    uids = np.array([prompts[row] for row in order], dtype=object)
    lengths = torch.randint(1, 10, (len(uids),), generator=generator)
    mask = (torch.arange(9) < lengths[:, None]).long()
    rewards = torch.zeros(len(uids), 9)
    rewards[torch.arange(len(uids)), lengths - 1] = torch.randn(len(uids), generator=generator)
    data = DataProto.from_single_dict({"token_level_rewards": rewards, "response_mask": mask, "uid": uids})
    return data, [f"{uid}_{row}_0" for row, uid in enumerate(uids)]


def advantages(estimator: str, by_std: bool = True, sizes: tuple[int, ...] = (8, 3, 2, 5, 1)) -> torch.Tensor:
    """By verl's own entry point, with the arguments of its trainer."""
    data, keys = ragged_batch(list(sizes))
    algorithm = OmegaConf.create({"norm_adv_by_std_in_grpo": by_std, "gamma": 1.0})
    result = compute_advantage_for_multi_trajectories(
        data, keys, estimator, norm_adv_by_std_in_grpo=by_std, config=algorithm
    )
    return result.batch["advantages"]


@pytest.fixture(autouse=True)
def _leave_the_registry_alone() -> Any:
    yield
    ADV_ESTIMATOR_REGISTRY.pop(NAME, None)


@pytest.mark.parametrize("by_std", [True, False])
def test_equals_verl_at_its_epsilon(by_std: bool) -> None:
    install_estimator(1e-6)
    ours, theirs = advantages(NAME, by_std), advantages("grpo", by_std)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_epsilon_is_the_installed_one() -> None:
    """(std + 1e-6) / (std + 1e-4) is what the epsilon changes; the last installation counts."""
    install_estimator(1e-6)
    install_estimator(1e-4)
    ours, theirs = advantages(NAME, sizes=(8,)), advantages("grpo", sizes=(8,))
    data, _ = ragged_batch([8])
    std = data.batch["token_level_rewards"].sum(-1).double().std()
    expected = theirs.double() * (std + 1e-6) / (std + 1e-4)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours, theirs, rtol=1e-5, atol=0)


def test_equal_rewards_give_zero_where_verl_divides_a_rounding_error() -> None:
    mask = torch.ones(6, 1)
    rewards, index = torch.full((6, 1), 0.1), np.array(["p"] * 6, dtype=object)
    ours, _ = grpo_advantages(rewards, mask, index, OmegaConf.create({}), epsilon=1e-6)
    assert ours.tolist() == [[0.0]] * 6


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != NAME])
def test_the_other_allowed_estimators_are_verls_and_run(estimator: str) -> None:
    values = advantages(estimator, sizes=(4, 4))
    assert values.shape == (8, 9)
    assert values.isfinite().all()
    assert values.abs().max() > 0


def outcomes_of(rewards: torch.Tensor, group: torch.Tensor, mask: torch.Tensor) -> Signals:
    nowhere, zeros = torch.zeros(len(mask), dtype=torch.bool), torch.zeros(mask.shape)
    return Signals(
        logp=zeros,
        logp_masked=None,
        logp_shuffled=None,
        entropy=zeros,
        mask=mask,
        group=group,
        has_visual=nowhere,
        has_temporal=nowhere,
        outcomes=Outcomes(rewards=rewards),
    )


def estimated(signals: Signals, epsilon: float) -> torch.Tensor:
    """[B, T] by the estimator, from token-level rewards as verl has them."""
    assert signals.outcomes is not None
    rewards = torch.zeros(signals.mask.shape)
    rewards[:, 0] = signals.outcomes.rewards
    index = signals.group.numpy().astype(str)
    return grpo_advantages(rewards, signals.mask.long(), index, OmegaConf.create({}), epsilon=epsilon)[0]


def selected(signals: Signals, epsilon: float, impl: str) -> torch.Tensor:
    """[B] by the selection."""
    assert signals.outcomes is not None
    groups = Segments.of(signals.group)
    entropy = Signal(values=signals.entropy, ratio=0.5)
    rewards = signals.outcomes.rewards
    found = select(
        [entropy],
        signals.mask,
        groups,
        rewards=rewards,
        groups=groups,
        epsilon=epsilon,
        impl=impl,  # type: ignore[arg-type]
    )
    assert found.response_advantages is not None
    return found.response_advantages


SPREADS = (1.0, 1e-2, 1e-4, 1e-6, 1e-7, 0.0)


@pytest.mark.parametrize("epsilon", [1e-4, 1e-6])
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_selection_and_estimator_agree_however_close_the_rewards_are(epsilon: float, impl: str) -> None:
    """Rewards around 0.9 that differ by a spread: at 1e-7 hardly more than their rounding is left."""
    pytest.importorskip("triton")
    group = torch.arange(4).repeat_interleave(6)
    mask = torch.arange(3) < torch.randint(1, 4, (24, 1))
    for spread in SPREADS:
        signals = outcomes_of(0.9 + spread * torch.rand(24), group, mask)
        found = selected(signals, epsilon, impl)
        gap = require_same(found, estimated(signals, epsilon), signals)
        assert gap == 0.0 if impl == "reference" else gap >= 0.0


@pytest.mark.parametrize("spread", SPREADS[:3])
def test_other_groups_or_rewards_are_found(spread: float) -> None:
    group = torch.arange(4).repeat_interleave(6)
    signals = outcomes_of(0.9 + spread * torch.rand(24), group, torch.ones(24, 3, dtype=torch.bool))
    found = selected(signals, 1e-6, "reference")
    swapped = found[torch.tensor([1, 0, *range(2, 24)])]
    with pytest.raises(
        KernelError, match=r"adv_estimator=keytoken_grpo by .*keytoken.kernels.impl=reference"
    ):
        require_same(swapped, estimated(signals, 1e-6), signals)
    with pytest.raises(KernelError):
        require_same(torch.full((24,), torch.nan), estimated(signals, 1e-6), signals)


def test_what_is_not_finite_is_left_to_the_loss() -> None:
    rewards = torch.tensor([1.0, torch.nan, 0.0, 1.0])
    signals = outcomes_of(rewards, torch.tensor([0, 0, 1, 1]), torch.ones(4, 2, dtype=torch.bool))
    assert np.isnan(require_same(selected(signals, 1e-6, "reference"), estimated(signals, 1e-6), signals))
    empty = outcomes_of(rewards, torch.zeros(4).int(), torch.ones(4, 0, dtype=torch.bool))
    assert require_same(rewards, torch.zeros(4, 0), empty) == 0.0
