"""Acts on a module of torch as soon as the program itself imports it. rnnfast does not: the import is slow."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):  # find_spec is no import: it may be asked alone
                sys.meta_path.remove(self)
                execute(module)
                self.action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign] # of this one loader
        return spec


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Calls `action` with the module `name`: at once if it is imported already, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    else:
        sys.meta_path.insert(0, _Finder(name, action))
