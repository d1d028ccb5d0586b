"""Rows: one prompt with its answer, taken out of verl's ragged batch and put back into one.

Legend: ``L`` tokens of prompt and answer, ``R`` tokens of the answer, ``B`` rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from torch import Tensor

from keytoken.attribution.views import ModelInput
from keytoken.prefix.packs import same_media

# How the uid of such rows begins (verl 0.9.1, trainer/ppo/padding_utils.py:179); ours begin with a digit.
_PADDING = "pad"


@dataclass(frozen=True, slots=True)
class Row:
    """One answer and all a forward pass needs of it.

    Example: a prompt of 3 tokens with an answer of 2 has ``input_ids`` of shape ``[5]``,
    ``position_ids`` of shape ``[4, 5]`` and ``response_length`` 2; its log-probs are read from the
    hidden states at rows 2 and 3.
    """

    input_ids: Tensor  # [L] int64
    position_ids: Tensor  # [4, L] int64: text row, then the three M-RoPE rows
    response_length: int
    media: Mapping[str, Tensor]  # pixel_values_videos, video_grid_thw, ...; empty for text
    prompt: str = ""  # verl's uid: the same for all answers to one prompt
    number: int = 0  # place in the batch of this rank

    @property
    def is_padding(self) -> bool:
        """Whether verl made this row up, to fill a batch: no answer to anything."""
        return self.prompt.startswith(_PADDING)

    @property
    def prompt_length(self) -> int:
        return len(self) - self.response_length

    @property
    def answer_ids(self) -> Tensor:
        return self.input_ids[self.prompt_length :]  # not [-R:], which is everything for R = 0

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


def rows_of(data: TensorDict) -> list[Row]:
    """Split a batch as verl hands it to a worker into rows; ``uid`` names the prompt of each."""
    ids = data["input_ids"].unbind()
    lengths = [int(row.shape[0]) for row in ids]
    positions = _split_positions(data["position_ids"], lengths)
    answers = [int(row.shape[0]) for row in data["responses"].unbind()]
    prompts = [str(uid) for uid in data["uid"]]
    media = [_media(data, index) for index in range(len(ids))]
    # Of references to the pixels of one prompt one is enough; nobody has to compare what they fetch.
    first = {getattr(one, "prompt", None): one for one in reversed(media)}
    media = [first[one.prompt] if hasattr(one, "prompt") else one for one in media]
    parts = zip(ids, positions, answers, media, prompts, range(len(ids)), strict=True)
    return [Row(*part) for part in parts]


def one_object_each(rows: Sequence[Row | None]) -> list[Row | None]:
    """The same rows; answers to one prompt that are shown the same have it in one object, not in copies."""
    first: dict[str, Mapping[str, Tensor]] = {}
    found: list[Row | None] = []
    for row in rows:
        media = first.setdefault(row.prompt, row.media) if row is not None else {}
        alike = row is not None and media is not row.media and same_media(media, row.media)
        found.append(replace(row, media=media) if row is not None and alike else row)
    return found


def model_input(row: Row) -> ModelInput:
    """What a view may see of a row, and what a pack is made of."""
    return ModelInput(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        prompt_length=row.prompt_length,
        media=row.media,
        prompt=row.prompt,
    )


def batch_of(rows: list[Row], temperature: float, use_remove_padding: bool) -> TensorDict:
    """The batch that verl's ``prepare_model_inputs`` expects, built from rows."""
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    ids = torch.cat([row.input_ids for row in rows])
    positions = torch.cat([row.position_ids for row in rows], dim=-1)
    batch = TensorDict(
        {
            "input_ids": _jagged(ids, offsets, ragged_dim=1),
            "position_ids": _jagged(positions, offsets, ragged_dim=2),
        },
        batch_size=[len(rows)],
    )
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(row.media) for row in rows))
    for key, value in (
        ("temperature", temperature),
        ("use_remove_padding", use_remove_padding),
        ("use_fused_kernels", False),
    ):
        batch[key] = NonTensorData(value)
    return batch


def answer_row_index(rows: list[Row], use_remove_padding: bool) -> Tensor:
    """:func:`answer_places` of rows."""
    lengths = torch.tensor([len(row) for row in rows])
    answers = torch.tensor([row.response_length for row in rows])
    return answer_places(lengths, answers, use_remove_padding)


def answer_places(lengths: Tensor, answers: Tensor, use_remove_padding: bool) -> Tensor:
    """Flat indices of the hidden states that predict the answer tokens, row after row.

    Token ``t`` of an answer is predicted at position ``L - R - 1 + t``. In a packed batch rows follow
    one another without gaps; in a padded one each takes ``max(L)`` places.

    Args:
        lengths: ``[B]`` int64, tokens of prompt and answer.
        answers: ``[B]`` int64, tokens of the answer.
        use_remove_padding: whether the batch is packed.

    Returns:
        ``[sum(R)]`` int64.

    Raises:
        ValueError: an answer without a prompt, whose first token nothing predicts.
    """
    if bool((answers >= lengths).any()):
        row = int((answers >= lengths).nonzero()[0])
        raise ValueError(
            f"Row {row} of the batch has {int(lengths[row])} tokens, {int(answers[row])} of them in its "
            "answer: nothing predicts the first one. Give it a prompt."
        )
    width = int(lengths.max())
    ends = lengths.cumsum(0) if use_remove_padding else torch.arange(len(lengths)) * width + lengths
    # Where an answer's first predictor lies, minus the number of answer tokens in the rows before it.
    shifts = ends - answers - 1 - (answers.cumsum(0) - answers)
    return torch.arange(int(answers.sum())) + shifts.repeat_interleave(answers)


def _jagged(values: Tensor, offsets: Tensor, ragged_dim: int) -> Tensor:
    longest = int(offsets.diff().max())
    return torch.nested.nested_tensor_from_jagged(
        values, offsets.to(values.device), jagged_dim=ragged_dim, max_seqlen=longest
    )


def _split_positions(position_ids: Tensor, lengths: list[int]) -> list[Tensor]:
    """``[4, L]`` for each row, whichever way the ragged dimension was recorded.

    Rows of equal length come back from storage with another ragged dimension than rows of unequal
    length (verl/utils/tensordict_utils.py:910), so the layout is read off the values themselves.
    """
    values = position_ids.values() if position_ids.is_nested else position_ids
    if values.ndim == 2 and values.shape[-1] == sum(lengths):
        return list(values.split(lengths, dim=-1))
    return list(values.reshape(len(lengths), -1, lengths[0]).unbind())


def _media(data: TensorDict, index: int) -> Mapping[str, Tensor]:
    """What the row carries; a mapping that fetches its pixels when asked is left as it is, unasked."""
    if "multi_modal_inputs" not in data.keys():  # noqa: SIM118 - a TensorDict is no dict
        return {}
    media = data["multi_modal_inputs"][index]
    media = media.data if isinstance(media, NonTensorData) else media
    if not isinstance(media or {}, dict):
        return media
    return {name: value for name, value in (media or {}).items() if value is not None}
