"""Decodes a file as training would, besides reading its header.

A module of its own, since it brings torch along: a child imports it before its first file, and only if asked.
"""

from dataclasses import replace

from keytoken.data.clips import read_clip
from keytoken.data.headers import Header, Inspection, MediaKind, inspect_file, num_vision_tokens
from keytoken.data.part import AnyClip, SpanError, span_of
from keytoken.errors import ClipError


def decode_file(clip: AnyClip, kind: MediaKind, asked: Inspection) -> Header:
    """Read the header and, of a video, the frames that the contract selects.

    Returns:
        The header with the shape of these frames, which need not be what it leads to expect.

    Raises:
        ClipError: The file is not what it is supposed to be, or cannot be opened or decoded.
        DataError: What the header alone would show as well, in the same words.
    """
    header = inspect_file(clip, kind, asked)
    if kind == "video" and asked.contract is not None:
        try:
            shape = tuple(read_clip(clip, asked.contract).frames.shape)
        except ClipError as error:
            num_vision_tokens(header, kind, asked.contract, span_of(clip))
            if isinstance(error.__cause__, SpanError):
                raise error.__cause__ from None
            raise
        header = replace(header, decoded_shape=shape)
    return header
