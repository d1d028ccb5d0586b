"""Converters from questions on videos to training rows, by name.

Add one: a module that ends in ``CONVERTER = Converter(...)``, with a function from the values of one row to a
:class:`~keytoken.data.prepare.samples.Draft`; one line below; and a test with worked rows. Checking media,
finding duplicates, writing and reporting are the same for all (:mod:`keytoken.data.prepare.build`).
"""

from keytoken.block import unknown_name
from keytoken.data.prepare import folder, tinyllava_video_r1, video_holmes, video_r1
from keytoken.data.prepare.converters import Converter
from keytoken.errors import ConfigurationError

CONVERTERS: dict[str, Converter] = {
    "folder": folder.CONVERTER,
    "tinyllava_video_r1": tinyllava_video_r1.CONVERTER,
    "video_holmes": video_holmes.CONVERTER,
    "video_r1": video_r1.CONVERTER,
}


def get_converter(name: str) -> Converter:
    """The converter of that name.

    Raises:
        ConfigurationError: If there is none; the message lists those that exist and the closest name.
    """
    if name not in CONVERTERS:
        raise ConfigurationError(unknown_name(f"converter {name!r}", name, CONVERTERS, "converters"))
    return CONVERTERS[name]
