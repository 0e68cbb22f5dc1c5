"""ImportHook: call back once certain modules have been imported, without importing them, and leave no trace afterwards.

The module's own loader object stays in place (`inspect` and `linecache` ask it for sources): only its ``exec_module`` is shadowed
on the instance for the duration of one import. Wrapping the loader in a class of ours was rejected because it shows.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class ImportHook:
    """Calls ``action`` once, when all of ``names`` have been imported; at once if they already are.

    Args:
        names: full module names. action: called without arguments, inside the import that completes the set; what it raises
            comes out of that import, so it had better not raise.
    """

    def __init__(self, names: Sequence[str], action: Callable[[], None]) -> None:
        self._waiting = {name for name in names if not _is_imported(name)}
        self._action = action

    def install(self) -> None:
        """Start watching (or call back now)."""
        if self._waiting:
            sys.meta_path.insert(0, self)
        else:
            self._action()

    def remove(self) -> None:
        """Stop watching; harmless when not watching."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the other finders give, set to report back; None for every other module."""
        if name not in self._waiting:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                self._watch(name, spec)
                return spec
        return None

    def _watch(self, name: str, spec: importlib.machinery.ModuleSpec) -> None:
        loader = spec.loader
        original = getattr(loader, "exec_module", None)
        if loader is None or original is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            original(module)
            self._arrived(name)

        loader.exec_module = exec_module  # type: ignore[method-assign]

    def _arrived(self, name: str) -> None:
        self._waiting.discard(name)
        if not self._waiting and self in sys.meta_path:
            self.remove()
            self._action()


def _is_imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)
