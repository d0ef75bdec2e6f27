"""``torch.compile`` and layers that are put into networks afterwards.

Dynamo takes a network to be what an earlier one of its class was, though other hooks are on its modules: a layer that
is injected after one such network was compiled would silently not run, and get no gradients.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from cea_arch.importing import follow_import

CONFIG = 'torch._dynamo.config'


def look_at_hooks() -> None:
    """Have dynamo look at modules' hooks, from now on or as soon as it is imported, which takes a second."""
    if CONFIG not in sys.modules:
        _follow_once()
    elif sys.modules[CONFIG].skip_nnmodule_hook_guards:
        sys.modules[CONFIG].skip_nnmodule_hook_guards = False
        sys.modules['torch._dynamo'].reset()  # what was compiled before did not look


@cache
def _follow_once() -> None:
    follow_import(CONFIG, _looking)


@contextmanager
def _looking() -> Iterator[None]:
    yield
    sys.modules[CONFIG].skip_nnmodule_hook_guards = False
