"""Run a function before or right after a module's first import; tell whether this is a CPU stack.

Patching verl eagerly would import vLLM, transformers and FSDP in every process (seconds each, twenty
processes). A hook costs nothing where the module is not used, and it runs before anyone can say
``from module import name`` and keep the unpatched object.

This module must not import torch: ``import torch`` itself imports it (see ``torch_extensions``).
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def on_cpu() -> bool:
    """Whether this installation computes on the CPU.

    Decided by the torch build (or ``VERL_PLATFORM``), never by what the process can see: on a GPU
    cluster many Ray actors see no GPU and still must agree with the others about the device type.
    """
    forced = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if forced:
        return forced == "cpu"
    import torch

    return torch.version.cuda is None and torch.version.hip is None


class _HookFinder(MetaPathFinder):
    """Finds hooked modules with the ordinary finders and runs the hooks around their execution."""

    def __init__(self) -> None:
        self.before: dict[str, list[Callable[[], None]]] = {}
        self.after: dict[str, list[Callable[[ModuleType], None]]] = {}
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hooked = fullname in self.before or fullname in self.after
        if not hooked or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_with_hooks(module: ModuleType) -> None:
            for before in self.before.get(fullname, ()):
                before()
            execute(module)
            for after in self.after.get(fullname, ()):
                after(module)

        spec.loader.exec_module = execute_with_hooks  # type: ignore[method-assign]
        return spec


_FINDER = _HookFinder()


def _finder() -> _HookFinder:
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    return _FINDER


def before_import(name: str, hook: Callable[[], None]) -> None:
    """Run ``hook()`` before module ``name`` is executed; an exception it raises is the import's.

    Does nothing for a module that is already imported.
    """
    _finder().before.setdefault(name, []).append(hook)


def when_imported(name: str, hook: Callable[[ModuleType], None]) -> None:
    """Run ``hook(module)`` now if module ``name`` is loaded, else right after its first import.

    Args:
        name: Absolute module name.
        hook: Receives the module; an exception it raises is the import's exception.
    """
    _finder().after.setdefault(name, []).append(hook)
    module = sys.modules.get(name)
    if module is not None:
        hook(module)
