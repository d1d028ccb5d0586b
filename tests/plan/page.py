"""What recipe/docs/scale.md shows of plans: ``python tests/plan/page.py`` prints it, and a test compares.

A table's rows are runs, given by their words.
"""

from __future__ import annotations

from keytoken.plan.report import COLUMNS, report, row
from keytoken.plan.run import plan_of

EXPERIMENTS = ("video_ktr_3b", "video_ktr_7b", "video_ktr_qwen3_vl_8b")
POOLS = ("one_gpu", "three_pools", "two_nodes", "eight_nodes")
TABLE = [[f"experiment={experiment}", f"pools={pools}"] for experiment in EXPERIMENTS for pools in POOLS]
OTHERS = [
    [
        "experiment=video_ktr_7b",
        "actor_rollout_ref.rollout.n_gpus_per_node=2",
        "keytoken.attribution.num_workers=2",
    ],
    ["experiment=video_ktr_7b", "pools=eight_nodes", "data.train_batch_size=256"],
]
LARGE = [
    *(
        "experiment=video_ktr_7b",
        "pools=eight_nodes",
        "trainer.nnodes=64",
        "actor_rollout_ref.rollout.nnodes=32",
    ),
    *("keytoken.attribution.num_workers=256", "data.train_batch_size=4096"),
]
EXAMPLE = ["experiment=video_ktr_7b"]


def tables() -> list[str]:
    """Every row of the page."""
    return [row(plan_of(words)) for words in (*TABLE, *OTHERS, LARGE)]


def figures() -> list[str]:
    """What the section on 1,000 GPUs says of them."""
    plan = plan_of(LARGE)
    traffic, limits = plan.traffic, plan.limits
    sync = plan.step.of("weight sync")
    assert sync is not None
    workers, needed = limits.decode_workers
    grouped = traffic.media_put * 2 / 1e9
    return [
        f"{traffic.media_got / 1e9:,.0f} GB of pixels a step",
        f"{limits.media_gb_s:.0f} GB/s",
        f"{grouped:,.0f} GB",
        f"{workers} processes would need {limits.decode_s:.0f} s",
        f"{needed} of them keep up",
        f"{limits.requests:,} answers a step",
        f"{plan.flops.prefill.total / plan.flops.old.total * 100:.0f} % of a scoring pass",
        f"{plan.step.parts[0].seconds:.1f} s of prefill",
        f"{traffic.weights / 1e9:,.0f} GB to {plan.pools.rollout + plan.pools.attribution} receivers",
        f"{sync.seconds:.1f} s",
        f"{traffic.batch / 1e9:.1f} GB of tokens",
        f"every {limits.failure_hours:.0f} hours",
        f"every {limits.checkpoint_steps} steps",
        f"{limits.lost_share:.1%} of the time",
        f"{traffic.checkpoint / 1e9:.0f} GB",
        f"{traffic.gathers / 1e12:.0f} TB",
    ]


if __name__ == "__main__":
    print(report(plan_of(EXAMPLE), with_assumptions=False), COLUMNS, *tables(), *figures(), sep="\n")
