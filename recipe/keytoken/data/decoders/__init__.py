"""Who reads a clip: one module for each decoder of video files, one for folders of frames, one for images.

All of them show the same frames. Which frames a clip has, and when, is read from the file's packets in one
place (:mod:`keytoken.data.decoders.index`); a decoder has to deliver exactly those or raise
:class:`~keytoken.data.decoders.base.DecoderError`.

``decoder: auto`` tries torchcodec where it is installed, then PyAV. decord, which most published runs used,
reads a clip by name only. Its numbers are not those of the frames: in tests on clips with numbered frames
(tests/data/test_decoders.py) it returned other frames than asked for from clips with open groups of pictures
or intra refresh, and from MPEG-TS, MPEG-PS, AVI and WMV files; decord 0.6.0 is the last release, of
2022.
"""

from keytoken.data.decoders import with_decord, with_pyav, with_torchcodec
from keytoken.data.decoders.base import Decode, Decoded, DecoderError, DecoderMissing

DECODERS: dict[str, Decode] = {
    "torchcodec": with_torchcodec.decode,
    "pyav": with_pyav.decode,
    "decord": with_decord.decode,
}
AUTO = ("torchcodec", "pyav")  # in this order

__all__ = ["AUTO", "DECODERS", "Decode", "Decoded", "DecoderError", "DecoderMissing"]
