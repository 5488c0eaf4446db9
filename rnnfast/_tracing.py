"""What torch.fx and torch.jit find on rnnfast's modules: one node, and the source of torch.nn's forward.

torch.jit.script asks each module for `__prepare_scriptable__` and gets torch.nn's class (modules.py). The older way, a
torch.jit.ScriptModule with a module of ours in it, asks the class for its compiled methods instead: `_methods`, and
`__overloads__` for the forward of layers, which takes a tensor or a PackedSequence.
"""

import functools
from typing import Any

import torch
from torch.fx import Proxy


@functools.cache
def _stubs(torch_class: type[torch.nn.Module]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(methods, overloads) that torch.jit compiles for a class of torch.nn."""
    from torch.jit._recursive import infer_methods_to_compile

    stock = torch_class(1, 1)
    stubs = infer_methods_to_compile(stock)
    return {f"{i}": stub for i, stub in enumerate(stubs)}, stock.__overloads__


class OfTorchClass:
    """A class attribute of the classes whose forward is rnnfast's own; a subclass with another forward has none."""

    def __init__(self, part: int):
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: torch.nn.Module | None, cls: type) -> Any:
        if cls.forward.__module__ != "rnnfast.modules":
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {self.name!r}")
        return _stubs(cls._torch_class)[self.part]


def proxy_in(*values: Any) -> Proxy | None:
    """A proxy of torch.fx among the arguments of a call, or in a tuple or list of them; None without one."""
    for value in values:
        if isinstance(value, (tuple, list)):
            value = proxy_in(*value)
        if isinstance(value, Proxy):
            return value
    return None


def record(module: torch.nn.Module, proxy: Proxy, input: Any, **given: Any) -> Proxy:
    """Under torch.fx.symbolic_trace: one call_module node with what is not None, as for the modules of torch.nn."""
    given = {name: value for name, value in given.items() if value is not None}
    args = (input, given.pop("hx")) if "hx" in given else (input,)
    return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(module), args, given)
