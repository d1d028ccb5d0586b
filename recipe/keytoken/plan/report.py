"""A plan as a page of text."""

from __future__ import annotations

import dataclasses

from keytoken.plan.assumptions import PREFIX
from keytoken.plan.run import Plan
from keytoken.plan.timing import Part

_GIB, _GB, _TERA = 2.0**30, 1e9, 1e12


def report(plan: Plan, with_assumptions: bool = True) -> str:
    """The page that ``keytoken plan`` prints."""
    sections = [_head(plan), _memory(plan), _time(plan), _network(plan), _limits(plan), _notes(plan)]
    if with_assumptions:
        sections.append(_assumptions(plan))
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: Plan) -> list[str]:
    model, work, pools = plan.model, plan.work, plan.pools
    text, vision = model.text.parameters / _GB, model.vision.parameters / _GB
    spread = (
        "in turns"
        if pools.together
        else f"{pools.actor} actor, {pools.rollout} rollout ({pools.engines} engines), "
        f"{pools.attribution} attribution"
    )
    frames, height, width = work.grid
    return [
        f"{plan.name}: {model.source}, {model.parameters / _GB:.2f} billion parameters "
        f"({text:.2f} text, {vision:.2f} vision)",
        f"on {pools.total} x {plan.given.device}: {spread}",
        f"a step: {work.prompts} prompts x {work.group} answers of {work.answer_tokens} tokens, at most "
        f"{work.longest_answer}",
        f"a prompt: {work.prompt_tokens} tokens, {work.video_tokens} of its clip "
        f"({frames} x {height} x {width} patches)",
        "Computed from the configuration and from what is assumed; nothing of it was measured.",
    ]


def _memory(plan: Plan) -> list[str]:
    names = list(dict.fromkeys(name for pool in plan.memory.values() for name in pool.parts))
    lines = [_row("GiB on one GPU of", *plan.memory)]
    for name in names:
        lines.append(_row(f"  {name}", *(_gib(pool.parts.get(name)) for pool in plan.memory.values())))
    lines.append(_row("  together", *(_gib(pool.needed) for pool in plan.memory.values())))
    lines.append(_row("  room", *(_gib(pool.room) for pool in plan.memory.values())))
    if plan.host:
        parts = ", ".join(f"{name} {value / _GIB:.0f}" for name, value in plan.host.items())
        lines.append(f"In the memory of a node of actors, GiB: {parts}.")
    cache = plan.cache
    lines.append(
        f"An engine's cache holds {cache.sequences} answers of the longest kind at once "
        f"({cache.token_bytes / 1024:.0f} KiB a token); {cache.wanted} are asked for."
    )
    return lines


def _time(plan: Plan) -> list[str]:
    lines = [_row("a step", "pool", "TFLOP", "seconds", "bound by")]
    lines += [_part(part) for part in plan.step.parts]
    rule = "sampling beside training" if plan.pools.ahead else "one after the other"
    beside = ", views beside old log-probs" if plan.pools.attribution else ""
    lines.append(_row("  whole step", "", "", f"{plan.step.seconds:.1f}", ""))
    lines.append(f"In order: {rule}{beside}.")
    busy = ", ".join(f"{pool} {seconds / plan.step.seconds:.0%}" for pool, seconds in plan.step.busy.items())
    lines.append(
        f"Busy: {busy}. Most time goes to: {plan.step.limit}. {3600 / plan.step.seconds:.0f} steps an hour."
    )
    return lines


def _network(plan: Plan) -> list[str]:
    traffic = plan.traffic
    rows = {
        "weights to engines and attribution": traffic.weights,
        "layers and gradients (FSDP)": traffic.gathers,
        "pixels put / got": (traffic.media_put, traffic.media_got),
        "frames to the engines": traffic.frames,
        "tokens and what belongs to them": traffic.batch,
        "a checkpoint, when one is written": traffic.checkpoint,
    }
    lines = ["GB that move in a step"]
    for name, value in rows.items():
        shown = " / ".join(f"{v / _GB:.2f}" for v in (value if isinstance(value, tuple) else (value,)))
        lines.append(f"  {name:<40}{shown:>16}")
    return lines


def _limits(plan: Plan) -> list[str]:
    limits = plan.limits
    workers, needed = limits.decode_workers
    return [
        f"A failure every {limits.failure_hours:.0f} h. A checkpoint takes {limits.checkpoint_s:.0f} s, best "
        f"every {limits.checkpoint_steps} steps: {limits.lost_share:.1%} of the time goes into both.",
        f"{workers} workers read the clips of a step in {limits.decode_s:.0f} s; {needed} or more keep up.",
        f"Pixels leave the data plane at {limits.media_gb_s:.2f} GB/s; {limits.requests:,} answers of a step "
        "are assigned to engines by one process.",
    ]


def row(plan: Plan) -> str:
    """The plan in one row of the table :data:`COLUMNS`."""
    pools, memory, busy = plan.pools, plan.memory, plan.step.busy
    sizes = "1, in turns" if pools.together else f"{pools.actor} + {pools.rollout} + {pools.attribution}"
    gib = " / ".join(f"{pool.needed / _GIB:.0f}" for pool in memory.values())
    seconds = " / ".join(f"{value:.1f}" for value in busy.values())
    cells = (
        plan.name,
        sizes,
        gib,
        plan.cache.sequences,
        seconds,
        f"{plan.step.seconds:.1f}",
        plan.step.limit,
    )
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = (
    "| run | GPUs: actor + rollout + attribution | GiB on each: rollout / actor / attribution "
    "| answers in an engine | s busy: rollout / actor / attribution | s a step | most busy |\n"
    "|---|---|---|--:|---|--:|---|"
)


def _notes(plan: Plan) -> list[str]:
    lines = [f"warning: {text}" for text in plan.warnings]
    if not plan.pools.ahead and not plan.pools.together:
        trained = plan.step.seconds - plan.step.busy["rollout"]
        both = min(plan.step.busy["rollout"], trained)
        lines.append(
            "One step off (trainer.v1.separate_async.num_warmup_batches=1) would hide up to "
            f"{both:.1f} s of a step."
        )
    return [*lines, _sharing(plan)]


def _sharing(plan: Plan) -> str:
    shared, separate = (plan.flops, plan.other) if plan.work.shared else (plan.other, plan.flops)
    scoring = separate.scoring.total / shared.scoring.total
    update = separate.update.total / shared.update.total
    divided = f"the operations of scoring by {scoring:.2f} and of the update by {update:.2f}"
    if plan.work.shared:
        return (
            f"Sharing prompts divides {divided}\n"
            "(keytoken.prefix=separate computes each prompt once for each answer)."
        )
    head = "" if plan.work.answer_head else " keytoken.kernels.head=fused"
    return (
        f"Each prompt is computed once for each answer; sharing (keytoken.prefix=shared{head}) would divide\n"
        f"{divided}."
    )


def _assumptions(plan: Plan) -> list[str]:
    lines = [f"Assumed ({PREFIX}KEY=VALUE changes one; * changed):"]
    for field in dataclasses.fields(plan.given):
        mark = "*" if field.name in plan.changed else " "
        value = getattr(plan.given, field.name)
        lines.append(f"{mark} {PREFIX}{field.name}={value}".ljust(36) + str(field.metadata["why"]))
    return lines


def _part(part: Part) -> str:
    flops = f"{part.flops / _TERA:,.0f}" if part.flops else "-"
    return _row(f"  {part.name}", part.pool, flops, f"{part.seconds:.1f}", part.bound)


def _row(name: str, *columns: str) -> str:
    return (f"{name:<24}" + "".join(f"{column:>13}" for column in columns)).rstrip()


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value / _GIB:.1f}"
