"""What the rollout engine itself makes of a request: seen from inside its workers.

An answer says nothing of what the engine's own processor did to the prompt. While a probe watches, the
workers note of every request with a known sampling seed: prompt ids with placeholders expanded, grids,
seconds per grid, figures of the pixels and the M-RoPE positions that the model is run with. Nothing is
computed again: the positions are those that the model returned to the engine.

The seams: verl's worker extension (verl 0.9.1, workers/rollout/vllm_rollout/utils.py), to which the probe is
added, and of vLLM ``model_runner.execute_model`` and the model's ``get_mrope_input_positions``, which both of
its model runners call. :mod:`keytoken.verl_adapter.probed_server` asks for what was seen. verl is imported
directly, because vLLM's workers need nothing else of what :mod:`keytoken.verl_adapter.compat` imports.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

from keytoken.parity import pixel_figures

_GRIDS = ("image_grid_thw", "video_grid_thw")
_PIXELS = ("pixel_values", "pixel_values_videos")
_SECONDS = "second_per_grid_ts"
# How vLLM is told of the extension.
EXTENSION = f"{__name__}.ProbedWorkerExtension"


class ProbedWorkerExtension(vLLMColocateWorkerExtension):
    """verl's worker extension, and a probe."""

    model_runner: Any  # of the vLLM worker that this class is mixed into

    def keytoken_watch(self, seeds: list[int]) -> None:
        """Note the requests with these sampling seeds from now on."""
        self._keytoken_probe = Probe(self.model_runner, seeds)

    def keytoken_seen(self) -> list[dict[str, Any]]:
        """Stop, and return what was noted: one entry for each request."""
        return self._keytoken_probe.stop()


class Probe:
    """Wraps two methods of a model runner while it watches.

    Args:
        runner: vLLM's model runner.
        seeds: Sampling seeds of the requests to note.
    """

    def __init__(self, runner: Any, seeds: list[int]) -> None:
        self._runner, self._model = runner, runner.get_model()
        self._seeds = set(seeds)
        self._seen: list[dict[str, Any]] = []
        self._placed: list[tuple[list[int], torch.Tensor, int]] = []
        self._wrap(runner, "execute_model", self._execute)
        self._has_mrope = hasattr(self._model, "get_mrope_input_positions")
        if self._has_mrope:
            self._wrap(self._model, "get_mrope_input_positions", self._place)

    def stop(self) -> list[dict[str, Any]]:
        """Leave the model runner as it was; returns what was noted."""
        del self._runner.execute_model
        if self._has_mrope:
            del self._model.get_mrope_input_positions
        return self._seen

    @staticmethod
    def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
        # An attribute of the instance hides the method; deleting it brings the method back.
        object.__setattr__(owner, name, functools.partial(around, getattr(owner, name)))

    def _place(self, place: Callable[..., Any], tokens: Any, features: Any, *args: Any, **kwargs: Any) -> Any:
        positions, delta = place(tokens, features, *args, **kwargs)
        self._placed.append((list(tokens), positions, int(delta)))
        return positions, delta

    def _execute(self, execute: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        self._placed.clear()
        result = execute(scheduled, *args, **kwargs)
        for request in scheduled.scheduled_new_reqs:
            seed = getattr(request.sampling_params, "seed", None)
            if seed in self._seeds:
                self._seen.append({"seed": seed, **self._note(request)})
        return result

    def _note(self, request: Any) -> dict[str, Any]:
        ids = list(request.prompt_token_ids)
        placed = next(((p, d) for tokens, p, d in self._placed if tokens[: len(ids)] == ids), None)
        media = [feature.data.get_data() for feature in request.mm_features if feature.data is not None]
        return {
            "ids": ids,
            "positions": None if placed is None else placed[0][:, : len(ids)].tolist(),
            "delta": None if placed is None else placed[1],
            "vocabulary": int(self._runner.model_config.get_vocab_size()),
            **media_note(media),
        }


def media_note(media: list[dict[str, Any]]) -> dict[str, Any]:
    """Grids, seconds and figures of pixels of a prompt's media, images first, as plain numbers."""
    note: dict[str, Any] = {"grids": [], "pixels": []}
    for grid_name, pixel_name in zip(_GRIDS, _PIXELS, strict=True):
        for item in media:
            if grid_name not in item:
                continue
            grids = torch.as_tensor(item[grid_name]).cpu().reshape(-1, 3)
            note["grids"] += grids.tolist()
            if pixel_name in item:
                note["pixels"] += pixel_figures(torch.as_tensor(item[pixel_name]).cpu(), grids).tolist()
    seconds = [torch.as_tensor(item[_SECONDS]).reshape(-1) for item in media if _SECONDS in item]
    if seconds:  # a family that writes times into the prompt has none
        note["seconds"] = torch.cat(seconds).cpu().double().tolist()
    return note
