import math
from collections.abc import Callable

import torch

from keytoken.attribution.views import ModelInput
from keytoken.schema import MethodConfig
from keytoken.study import passes
from keytoken.study.policy import Model
from keytoken.study.prompts import Prompt


def rows_of(prompts: tuple[Prompt, ...]) -> list[ModelInput]:
    return [prompt.with_answer(torch.arange(20, 23 + place)) for place, prompt in enumerate(prompts)]


def test_a_view_scores_the_rows_that_have_it(
    model: Model, prompts: tuple[Prompt, ...], method: Callable[..., MethodConfig]
) -> None:
    rows = rows_of(prompts)
    context = passes.view_context(model, method(visual_ratio=0.2), seed=0)
    found, applies, read = passes.view_pass(model, rows, "masked", context, temperature=0.5)
    assert applies.tolist() == [bool(row.media) for row in rows]
    kept = 0
    for index, row in enumerate(rows):
        length = row.input_ids.numel() - row.prompt_length
        expected = torch.zeros(found.shape[1])
        if row.media:
            text = row.input_ids != model.config.video_token_id
            kept += int(text.sum())
            with torch.no_grad():
                hidden = model.model(
                    input_ids=row.input_ids[None, text],
                    position_ids=row.position_ids[:, None, text],
                    use_cache=False,
                ).last_hidden_state[0, -length - 1 : -1]
                log_p = (model.lm_head(hidden) / 0.5).log_softmax(-1)
            expected[:length] = log_p[torch.arange(length), row.input_ids[-length:]]
        assert torch.allclose(found[index], expected, atol=2e-5)
    assert read == kept


def test_no_row_with_the_view(
    model: Model, prompts: tuple[Prompt, ...], method: Callable[..., MethodConfig]
) -> None:
    text = [prompt for prompt in prompts if not prompt.media]
    context = passes.view_context(model, method(), seed=0)
    found, applies, read = passes.view_pass(model, rows_of(tuple(text)), "shuffled", context, 1.0)
    assert not found.any() and not applies.any() and read == 0


def test_disagreement_by_the_formula() -> None:
    """Token by token in double loops; the second answer of the first prompt has ended after one token."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()
    group = torch.tensor([4, 4, 9, 9])
    logits = 3 * torch.randn(int(mask.sum()), 5)
    found = passes.group_disagreement(logits, mask, group, temperature=2.0)
    log_p = {}
    for (row, step), z in zip(mask.nonzero().tolist(), logits.double() / 2.0, strict=True):
        log_p[row, step] = [float(v) for v in z - z.exp().sum().log()]
    uniform = [-math.log(5)] * 5
    for row, step in mask.nonzero().tolist():
        members = [g for g in range(4) if group[g] == group[row]]
        dists = [log_p.get((g, step), uniform) for g in members]
        mean = [sum(values) / len(members) for values in zip(*dists, strict=True)]
        total = 0.0
        for dist in dists:
            for m, v in zip(mean, dist, strict=True):
                d = min(max(m - v, -11.0), 11.0)
                total += math.exp(d) - d - 1
        assert abs(float(found[row, step]) - total / len(members)) < 1e-4
    assert not found[~mask].any()
    alike = passes.group_disagreement(logits[:1].repeat(4, 1), torch.ones(2, 2).bool(), group[:2], 1.0)
    assert alike.abs().max() < 1e-6
