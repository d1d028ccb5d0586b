"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

PyPI's torchvision wheel is linked against CUDA. Next to CPU torch its extension cannot be loaded, and
importing torchvision dies in ``torchvision/_meta_registrations.py:163`` (0.28.0) because
``torchvision::nms`` and ``torchvision::qnms`` were never declared. The transformers video processors
import torchvision but use none of these operators, so their schemas are declared here without an
implementation: calling one still fails loudly.
"""

import importlib.util
from pathlib import Path

import torch

# The operators that torchvision registers a fake kernel for without first asking whether they exist.
_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

# A Library takes its operators away when it is collected, so it is kept here.
_declared: list[torch.library.Library] = []


def declare_missing_operators() -> None:
    """Declare torchvision's operator schemas where its extension cannot be loaded.

    Call it before the first import of torchvision; later calls do nothing, nor does a call where the
    extension works or torchvision is not installed.
    """
    if _declared or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    for extension in Path(spec.submodule_search_locations[0]).glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _MISSING_SCHEMAS:
        library.define(schema)
    _declared.append(library)
