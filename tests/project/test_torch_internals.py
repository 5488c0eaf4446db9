"""Each private name of torch that rnnfast uses exists and behaves as rnnfast/_torch_internals.py says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

import rnnfast
from rnnfast import _torch_internals as internals
from rnnfast.ops import CELLS

FOLDER = Path(rnnfast.__file__).parent
OF_NAMED_TUPLES = {"_replace", "_fields"}
OF_RNNFAST = {"_cpu_isa", "_frozen_isa", "_stream_step", "_cuda_plan", "_cuda_allow_tf32"}  # operators
# Read at every call, so without a function between.
OF_LAYERS = {"_flat_weights", "_flat_weights_names", "_parameters", "_buffers"}


def private_names(tree):
    """(names that a module defines or gives to its objects, names of attributes that it reads)."""
    own, read = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
            elif node.attr.startswith("_") and not node.attr.endswith("__"):
                read.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            names = [name.name for name in node.names] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] == "torch" for module in modules):
                for part in ".".join([*modules, *names]).split("."):
                    if part.startswith("_"):
                        read.setdefault(part, node.lineno)
    return own, read


def test_no_other_module_names_a_private_attribute():
    trees = {path: ast.parse(path.read_text()) for path in sorted(FOLDER.rglob("*.py"))}
    own = set().union(*(private_names(tree)[0] for tree in trees.values()))
    found = {
        f"{path.relative_to(FOLDER)}:{line} {name}"
        for path, tree in trees.items()
        if path.name != "_torch_internals.py"
        for name, line in private_names(tree)[1].items()
        if name not in own | OF_NAMED_TUPLES | OF_RNNFAST | OF_LAYERS
    }
    assert not found


def test_a_private_attribute_is_found():
    assert private_names(ast.parse("import torch\ntorch._C.x"))[1] == {"_C": 2}
    assert private_names(ast.parse("from torch._subclasses import FakeTensor"))[1] == {"_subclasses": 1}
    assert private_names(ast.parse("from torch import _VF"))[1] == {"_VF": 1}


def test_nothing_is_active():
    assert internals.is_nothing_active()


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert internals.is_any_autocast_enabled() and not internals.is_nothing_active()
    assert not internals.is_any_autocast_enabled()


def test_forward_ad():
    assert internals.forward_ad_level() < 0
    with forward_ad.dual_level():
        assert internals.forward_ad_level() == 0 and not internals.is_nothing_active()


def test_transforms():
    seen = []

    def f(x):
        seen.append((internals.is_transforming(), internals.is_nothing_active()))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    assert seen == [(True, False)] and not internals.is_transforming()


def test_jit_trace():
    seen = []

    def f(x):
        seen.append((internals.tracing_state() is not None, internals.is_nothing_active()))
        return x + 1

    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert seen == [(True, False)] and internals.tracing_state() is None


def test_export():
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x):
            seen.append(internals.is_exporting() and torch.compiler._is_compiling_flag)
            return x + 1

    torch.export.export(Model(), (torch.ones(2),), strict=False)
    assert all(seen) and seen and not internals.is_exporting()


def test_saved_tensors_hooks():
    assert internals.saved_tensors_hooks(True) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert internals.saved_tensors_hooks(True) is not None


def test_traced_types():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert isinstance(torch.empty(2), internals.TRACED_TYPES)


def test_batched():
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(internals.is_batched(grad))
            return 2 * grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Twice.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Twice.apply(x), x, torch.ones(2))
    assert not internals.is_batched(torch.ones(2)) and seen[-1] is False


def test_versions():
    x = torch.zeros(4)
    view, before = x[:2], internals.version_of(x)
    view.add_(1)
    assert internals.version_of(x) == before + 1 == internals.version_of(x.detach())


def test_code_of_subclasses():
    class Silent(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    class Function(torch.Tensor):
        pass

    class Dispatch(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    found = [internals.has_code_of_its_own(cls) for cls in (Silent, Function, Dispatch, torch.nn.Parameter)]
    assert found == [False, True, True, False]


def test_processor():
    assert internals.has_bf16_products() in (False, True)
    assert set(internals.onednn_dtypes()) <= {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_recurrent_operators(name):
    gates, states = {"lstm": (4, 2), "gru": (3, 1)}.get(name, (1, 1))
    hx = [torch.zeros(1, 2, 5)] * states
    weights = [torch.randn(gates * 5, 3), torch.randn(gates * 5, 5)]
    operator = internals.recurrent_operator(name)
    output, *finals = operator(
        torch.randn(4, 2, 3), hx if states > 1 else hx[0], weights, False, 1, 0.0, False, False, False
    )
    assert output.shape == (4, 2, 5) and len(finals) == states


def test_without_python_frame():
    overload = CELLS["gru"].step.infer
    arguments = torch.randn(2, 3), None, torch.randn(15, 3), torch.randn(15, 5), None, None
    assert torch.equal(internals.without_python_frame(overload)(*arguments), overload(*arguments))


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        Saving.places = internals.saved_places(ctx, slice(0, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            len(ctx.saved_tensors)
        internals.stop_checking(ctx, [1])
        x, y = ctx.saved_tensors
        return grad * y, grad * x


def test_apply_and_saved_tensors():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2)
    result = internals.eager_apply(Saving)(x, y)
    y.add_(1)
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient.tolist() == [2, 2]
    assert [place.tolist() for place in Saving.places] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_weights_of_layers(name):
    module = getattr(torch.nn, name)(3, 5, bidirectional=True)
    assert module._flat_weights_names == [name for name, _ in module.named_parameters()]
    assert all(a is b for a, b in zip(module._flat_weights, module._parameters.values(), strict=True))
    refs = internals.flat_weight_refs(module)
    assert all(ref() is weight for ref, weight in zip(refs, module._flat_weights, strict=True))
    del module.weight_hh_l0
    module.weight_hh_l0 = torch.zeros_like(module.weight_hh_l0_reverse.detach())
    internals.reset_flat_weights(module)
    assert module._flat_weights[1] is module.weight_hh_l0


def test_methods_to_script():
    stubs = internals.methods_to_script(torch.nn.GRUCell(3, 5))
    assert [stub.original_method.__name__ for stub in stubs] == ["forward"]


def test_assume_constant():
    program = """
import torch
from rnnfast import _torch_internals as internals

def ask():
    return len(str(torch.ones(2).numpy()))  # breaks a graph, if traced

internals.assume_constant(ask)
compiled = torch.compile(lambda x: x + ask(), fullgraph=True, backend="eager")
assert compiled(torch.zeros(1)).item() == ask()

import importlib, inspect
builder = importlib.import_module(internals.DYNAMO_BUILDER)
assert list(inspect.signature(builder.VariableBuilder.wrap_module).parameters) == ["self", "value"]
assert builder.config.allow_rnn is False
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_hooks_of_a_module():
    module = torch.nn.LSTM(2, 3)
    assert not internals.has_hooks(module)
    module.register_forward_pre_hook(lambda module, arguments: None).remove()
    assert not internals.has_hooks(module)
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(module, f"register_{register}")(lambda *arguments: None)
        assert internals.has_hooks(module)
        handle.remove()
