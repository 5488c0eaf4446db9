"""torch.fx, torch.jit, proxy tensors, torch.compile and torch.export around the modules."""

import io
import warnings

import pytest
import torch
from support.torch_tools import KINDS, Model, Rows, assert_plant_is_caught, first, leaf, sample, train, weight
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    state_of,
    tensors,
    total,
)
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def trained(callable_, module):
    """Result and gradients of the input through what was made of the module."""
    x = leaf(module)
    result = callable_(x)
    total(result).backward()
    return result, x.grad


# ------------------------------------------------ torch.fx

FX = Rows()


def nodes(graph):
    """The graph by kinds of nodes and their names."""
    return [(node.op, str(node.target)) for node in graph.nodes if node.op != "call_function"]


class Readout(nn.Module):
    """A model that symbolic tracing can follow: no test of what the module returned."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.single = isinstance(module, (nn.RNNCell, nn.GRUCell))

    def forward(self, x):
        result = self.module(x * 2)
        return (result if self.single else result[0]) + 1


class Called(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


class Doubled(fx.Transformer):
    def call_module(self, target, args, kwargs):
        result = super().call_module(target, args, kwargs)
        return result


FX["symbolic_trace"] = lambda m: trained(fx.symbolic_trace(Readout(m)), m)
FX["symbolic_trace_nodes"] = lambda m: (nodes(fx.symbolic_trace(Readout(m)).graph), sample(m))
FX["symbolic_trace_code"] = lambda m: (fx.symbolic_trace(Readout(m)).code, sample(m))
FX["interpreter"] = lambda m: fx.Interpreter(fx.symbolic_trace(Readout(m))).run(sample(m))
FX["transformer"] = lambda m: trained(Doubled(fx.symbolic_trace(Readout(m))).transform(), m)
FX["graph_module"] = lambda m: trained(fx.GraphModule(Readout(m), fx.symbolic_trace(Readout(m)).graph), m)
FX["lint"] = lambda m: (fx.symbolic_trace(Readout(m)).graph.lint(), sample(m))
FX["wrapped_leaf_tracer"] = lambda m: trained(fx.GraphModule(Readout(m), fx.Tracer().trace(Readout(m))), m)


class Deep(fx.Tracer):
    """Goes into every module."""

    def is_leaf_module(self, module, name):
        return False


BETTER_FX = Rows(
    better="torch.nn's forward branches on its input, which tracing into it cannot follow; ours records one node",
    prepare=lambda module: setattr(module, "plain", True),
)


def traced(how):
    def program(module):
        return module(sample(module)) if hasattr(module, "plain") else how(module)(sample(module))

    return program


BETTER_FX["traced_into"] = traced(lambda m: fx.GraphModule(Called(m), Deep().trace(Called(m))))


@FX.add()
def shape_prop(module):
    traced = fx.symbolic_trace(Readout(module))
    ShapeProp(traced).propagate(sample(module))
    return [tuple(node.meta["tensor_meta"].shape) for node in traced.graph.nodes if node.op == "output"], sample(module)


@FX.add()
def replace_pattern(module):
    traced = fx.symbolic_trace(Readout(module))
    fx.replace_pattern(traced, lambda x: x * 2, lambda x: x * 3)
    return trained(traced, module)


@FX.add()
def submodules_of_a_trace(module):
    traced = fx.symbolic_trace(Readout(module))
    traced.delete_all_unused_submodules()
    return traced.get_submodule("module") is module, trained(traced, module)


# ------------------------------------------------ proxy tensors and FakeTensor

PROXY = Rows()


def proxied(mode, function=lambda module: lambda x: first(module(x))):
    """Values of a graph of operators."""

    def program(module):
        graph = make_fx(function(module), tracing_mode=mode, _allow_non_fake_inputs=True)(sample(module))
        return graph(sample(module)), graph(sample(module) * 2)

    return program


def gradient(module):
    def run(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(first(module(x)).sum(), x)[0]

    return run


for mode in ("real", "fake", "symbolic"):
    kinds = ("gru", "lstmcell") if mode == "symbolic" else KINDS
    PROXY.put(f"make_fx_{mode}", proxied(mode), kinds=kinds)
    PROXY.put(f"make_fx_{mode}_gradient", proxied(mode, gradient), kinds=kinds)


@PROXY.add()
def fake_tensors(module):
    """Shapes without values."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = module(mode.from_tensor(sample(module)))
    return [(tuple(t.shape), t.dtype) for t in tensors(result)], sample(module)


@PROXY.add()
def functional_tensors(module):
    return torch.func.functionalize(lambda x: first(module(x)))(sample(module))


# ------------------------------------------------ torch.jit

# Compilers take their time; what is left out differs from these in a number.
JIT = Rows(kinds=("gru", "lstm", "lstm_proj", "rnncell_tanh", "lstmcell"))


class Holder(nn.Module):
    """Script compiles layers inside a model only."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor):
        return self.layer(x)


class Looping(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor):
        result = self.layer(x)
        for _ in range(2):
            result = self.layer(x)
        return result


class Forking(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor):
        future = torch.jit.fork(self.layer, x)
        return torch.jit.wait(future)


def scripted_method(layer):
    class Scripted(torch.jit.ScriptModule):
        def __init__(self):
            super().__init__()
            self.layer = layer

        @torch.jit.script_method
        def forward(self, x: Tensor):
            return self.layer(x)

    return Scripted()


def compiled(make, train=True):
    def program(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make(module)
            return trained(made, module) if train else made(sample(module))

    return program


def through_a_file(scripted):
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


JIT["script"] = compiled(lambda m: torch.jit.script(Holder(m)))
JIT["script_loop"] = compiled(lambda m: torch.jit.script(Looping(m)))
JIT["script_fork"] = compiled(lambda m: torch.jit.script(Forking(m)))
JIT["script_alone"] = compiled(lambda m: torch.jit.script(m))
JIT["script_sequential"] = compiled(lambda m: torch.jit.script(nn.Sequential(m)))
JIT["script_module_list"] = compiled(lambda m: torch.jit.script(Holder(nn.Sequential(nn.Identity(), m))))
JIT["script_method"] = compiled(scripted_method)
JIT["script_saved"] = compiled(lambda m: through_a_file(torch.jit.script(Holder(m))))
JIT["script_method_saved"] = compiled(lambda m: through_a_file(scripted_method(m)))
JIT["freeze"] = compiled(lambda m: torch.jit.freeze(torch.jit.script(Holder(m).eval())), train=False)
JIT["optimize_for_inference"] = compiled(
    lambda m: torch.jit.optimize_for_inference(torch.jit.script(Holder(m).eval())), train=False
)
JIT["trace"] = compiled(lambda m: torch.jit.trace(m, sample(m)))
JIT["trace_strict_off"] = compiled(lambda m: torch.jit.trace(m, sample(m), strict=False))
JIT["trace_model"] = compiled(lambda m: torch.jit.trace(Model(m), sample(m)))
JIT["trace_module"] = compiled(lambda m: torch.jit.trace_module(m, {"forward": sample(m)}))
JIT["trace_saved"] = compiled(lambda m: through_a_file(torch.jit.trace(m, sample(m))))
JIT["trace_frozen"] = compiled(lambda m: torch.jit.freeze(torch.jit.trace(m.eval(), sample(m))), train=False)
JIT["trace_with_states"] = compiled(
    lambda m: lambda x: torch.jit.trace(m, (sample(m), state_of(m, 2)))(x, state_of(m, 2))
)
JIT["trace_under_no_grad"] = compiled(lambda m: torch.no_grad()(torch.jit.trace)(m, sample(m)))
JIT["trace_a_function"] = compiled(
    lambda m: torch.jit.trace(lambda x: first(m.requires_grad_(False)(x)), sample(m)), train=False
)
JIT["script_if_tracing"] = compiled(lambda m: torch.jit.script_if_tracing(lambda x: first(m(x))))
JIT["ignore"] = compiled(lambda m: torch.jit.ignore(lambda x: first(m(x))))
JIT["fork_in_eager"] = compiled(lambda m: lambda x: torch.jit.wait(torch.jit.fork(m, x)))


@JIT.add(kinds=("gru", "lstm"))
def scripted_with_states(module):
    """A call with states, by a class per kind of states."""

    class One(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, h: Tensor):
            return self.layer(x, h)

    class Two(One):
        def forward(self, x: Tensor, h: tuple[Tensor, Tensor]):
            return self.layer(x, h)

    states = state_of(module, 2)
    model = torch.jit.script((Two if isinstance(states, tuple) else One)(module))
    return model(sample(module), states)


@JIT.add()
def changed_after_script(module):
    """The scripted model has the very same parameters."""
    made = torch.jit.script(Holder(module))
    with torch.no_grad():
        weight(module).mul_(0.5)
    return trained(made, module), train(module)


@JIT.add()
def attributes_of_the_scripted(module):
    made = torch.jit.script(Holder(module))
    names = [name for name, _ in made.named_parameters()], list(made.state_dict())
    return names, made.layer.hidden_size, made.layer.input_size, made.training, sample(module)


@JIT.add()
def scripted_eval(module):
    made = torch.jit.script(Holder(module)).eval()
    return made.training, made(sample(module)), made.layer.training


@JIT.add()
def scripted_dtype(module):
    made = torch.jit.script(Holder(module)).double()
    return made(sample(module).double())


# ------------------------------------------------ torch.compile, with a backend that compiles nothing

COMPILE = Rows()


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch.compiler.reset()


COMPILE.put("compiler_disable", lambda m: trained(torch.compiler.disable(m), m))
COMPILE.put("module_compile", lambda m: (m.compile(backend="eager"), trained(m, m))[1], kinds=("gru", "lstmcell"))
COMPILE.put("compile", lambda m: trained(torch.compile(m, backend="eager"), m), kinds=("lstm", "grucell"))
COMPILE.put(
    "compile_aot",
    lambda m: trained(torch.compile(Model(m), backend="aot_eager"), m),
    kinds=("rnn_tanh", "rnncell_tanh"),
)
COMPILE.put("export", lambda m: torch.export.export(m, (sample(m),)).module()(sample(m)), kinds=("gru", "lstmcell"))


@COMPILE.add(kinds=("lstm_proj",))
def compiled_state_dict(module):
    compiled_module = torch.compile(module, backend="eager")
    return list(compiled_module.state_dict()), trained(compiled_module, module)


@FX.parametrize()
def test_fx(name, kind):
    FX.check(name, kind)


@BETTER_FX.parametrize()
def test_fx_better(name, kind):
    BETTER_FX.check(name, kind)


@PROXY.parametrize()
def test_proxy(name, kind):
    PROXY.check(name, kind)


@JIT.parametrize()
def test_jit(name, kind):
    JIT.check(name, kind)


@COMPILE.parametrize()
def test_compile(name, kind):
    COMPILE.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(FX)
