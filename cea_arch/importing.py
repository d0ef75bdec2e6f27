"""Do something around the import of another package's module whenever that happens, without importing it now."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def follow_import(name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Have the module ``name`` run within ``around()`` when it is imported; more than one call, one within another."""
    sys.meta_path.insert(0, _Finder(name, around))


class _Finder:
    """Finds one module where the other finders find it."""

    def __init__(self, name: str, around: Callable[[], AbstractContextManager[None]]) -> None:
        self.name = name
        self.around = around

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.around)
        return spec


class _Loader:
    """Loads a module as its own loader does, and leaves it that one."""

    def __init__(self, loader: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
        self.loader = loader
        self.around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        with self.around():
            self.loader.exec_module(module)
