"""Every private name of torch that rnnfast uses. No other module names one, but for a layer's list of weights.

tests/project/test_torch_internals.py asks for each whether it exists and behaves as said here. Try a new torch there
first.
Nothing here imports torch._dynamo, which takes seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import _C, Tensor, compiler
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

# What torch is doing at this moment.


def is_nothing_active() -> bool:
    """Whether torch makes no graph and none of the modes below is active: all that the fast path asks, in one call.

    torch.compiler.is_compiling() asks for _is_compiling_flag too, and for torch.jit.script, in 0.1 us. Under Dynamo the
    flag tells nothing: ask torch.compiler.is_dynamo_compiling() first.
    """
    return not (
        compiler._is_compiling_flag
        or _C._is_any_autocast_enabled()
        or compiler._is_exporting_flag
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


is_any_autocast_enabled: Callable[[], bool] = _C._is_any_autocast_enabled
"""Whether autocast is on for some type of device. Asking for one type takes longer."""
tracing_state: Callable[[], Any] = _C._get_tracing_state
"""What torch.jit.trace is recording; None: it is not."""
is_transforming: Callable[[], bool] = _C._are_functorch_transforms_active
"""Whether this is within a transform of torch.func."""
is_exporting: Callable[[], bool] = partial(getattr, compiler, "_is_exporting_flag")
"""Whether torch.export is tracing. Dynamo of torch 2.11 takes torch.compiler.is_exporting() for true."""
forward_ad_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")
"""Below zero where no forward-mode AD is active."""
saved_tensors_hooks: Callable[[bool], Any] = _C._autograd._top_saved_tensors_default_hooks
"""The innermost hooks for saved tensors, or None. Its argument: whether to answer while torch traces, too."""


# Kinds of tensors and of processors.

TRACED_TYPES = (FakeTensor, FunctionalTensor)
"""Types of the tensors that stand for others while a graph is made."""
is_batched: Callable[[Tensor], bool] = _C._functorch.is_legacy_batchedtensor
"""Whether a tensor is a batch of gradients, as is_grads_batched=True makes them."""
version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor, its base or a view of it has been changed in place. Raises for tensors of inference mode."""


def has_code_of_its_own(cls: type[Tensor]) -> bool:
    """Whether a subclass of Tensor wants to see the calls that its tensors are given to."""
    return (
        cls.__torch_function__ is not _C._disabled_torch_function_impl
        or cls.__torch_dispatch__ is not _C._disabled_torch_dispatch_impl
    )


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX-512-BF16)."""
    return torch.cpu._is_avx512_bf16_supported()


def onednn_dtypes() -> Iterator[torch.dtype]:
    """The dtypes of input for which torch runs oneDNN's LSTM on this CPU."""
    if torch.backends.mkldnn.is_available():
        yield torch.float32
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            yield torch.bfloat16
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            yield torch.float16


# Operators and autograd.


def recurrent_operator(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """torch's own operator of a stack of layers: "lstm", "gru", "rnn_tanh" or "rnn_relu"."""
    return getattr(torch._VF, name)


def without_python_frame(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """An operator's overload without the Python frame of OpOverload, 0.2 us of each call. Dynamo wants the overload."""
    return overload._op


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Function.apply without its preparations for torch.func, which take 5 us of a call's 25 (Zen 4)."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc] # of a base class in C++


def saved_places(ctx: Any, places: slice) -> list[Tensor]:
    """Some of the tensors that ctx.save_for_backward got, without autograd's check for changes in place."""
    return [saved.data for saved in ctx._raw_saved_tensors[places]]


def stop_checking(ctx: Any, places: Iterable[int]) -> None:
    """Autograd finds no change in place of these saved tensors from now on: it checks no tensor that has hooks."""
    for place in places:
        ctx._raw_saved_tensors[place].register_hooks(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


# torch.nn.


def flat_weight_refs(module: Any) -> list[Callable[[], Tensor | None] | None]:
    """Weak references to the tensors that torch.nn last saw under the names of a layer's weights; None: no tensor."""
    return module._flat_weight_refs


def reset_flat_weights(module: Any) -> None:
    """Makes torch.nn take a layer's weights by their names again."""
    module._init_flat_weights()


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calls of a module run hooks that were registered on it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


# torch.jit and torch.compile.


def methods_to_script(module: torch.nn.Module) -> Sequence[Any]:
    """The methods of a module that torch.jit.script compiles."""
    from torch.jit._recursive import infer_methods_to_compile

    return infer_methods_to_compile(module)


DYNAMO_BUILDER = "torch._dynamo.variables.builder"
"""The module whose VariableBuilder.wrap_module wraps each torch.nn.Module that torch.compile meets."""


def assume_constant(function: Callable[..., Any]) -> None:
    """torch._dynamo.assume_constant_result, without its import: torch.compile calls `function` while it traces."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
