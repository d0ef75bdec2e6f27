"""``torch.compile`` and layers that are put into networks afterwards.

Dynamo takes a network to be what an earlier one of its class was, though other hooks are on its modules: a layer that
is injected after one such network was compiled would silently not run, and get no gradients.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

CONFIG = 'torch._dynamo.config'


def look_at_hooks() -> None:
    """Have dynamo look at modules' hooks, from now on or as soon as it is imported, which takes a second."""
    if CONFIG in sys.modules:
        config = sys.modules[CONFIG]
        if config.skip_nnmodule_hook_guards:
            config.skip_nnmodule_hook_guards = False
            sys.modules['torch._dynamo'].reset()  # what was compiled before did not look
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds dynamo's settings where the other finders find them."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != CONFIG:
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader:
    """Loads dynamo's settings as their own loader does, and changes the one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.skip_nnmodule_hook_guards = False
