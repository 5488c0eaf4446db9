"""torch.compile(fullgraph=True): no graph break, dynamic T and B, one operator per layer whatever T, same numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import harness
from support.compiled import assert_same, make, tensors
from support.harness import CELLS, Case

import rnnfast
from rnnfast import _ext

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counter:
    """A Dynamo backend that keeps the operators of each graph; with aot=True those after AOTAutograd, backward too."""

    def __init__(self, aot: bool = False):
        self.graphs: list[list[str]] = []
        self.aot = aot

    def keep(self, graph, example_inputs):
        self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    def __call__(self, graph, example_inputs):
        if not self.aot:
            return self.keep(graph, example_inputs)
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def compiler(g, inputs):
            return make_boxed_func(self.keep(g, inputs))

        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)(graph, example_inputs)


STACKS = {
    **{cell: (cell, {}) for cell in CELLS},
    "gru-2-bidirectional": ("gru", {"layers": 2, "bidirectional": True}),
    "lstm-proj-3": ("lstm", {"layers": 3, "proj": 3}),
    "lstm-batch-first-no-bias": ("lstm", {"batch_first": True, "bias": False, "bidirectional": True}),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", STACKS)
def test_fullgraph_equals_eager(name, training):
    cell, options = STACKS[name]
    model = make(cell, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        assert_same(compiled, model, torch.randn(5, 4, 3), training=training)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("cell", CELLS)
def test_dynamic_length_and_batch(cell, training):
    """One graph for all T and B >= 2 with dynamic=True, hx given; right at each."""
    model, counter = make(cell), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(training):
        for seq_len, batch in [(5, 4), (7, 4), (3, 9), (40, 2), (6, 5)]:
            hx = torch.randn(1, batch, 6)
            hx = (hx, torch.randn(1, batch, 6)) if cell == "lstm" else hx
            assert_same(compiled, model, torch.randn(seq_len, batch, 3), hx, training=training)
    assert len(counter.graphs) == 1


def test_automatic_dynamic_compiles_twice_at_most():
    """By default Dynamo specialises on the first shape and generalises at the second; a third must compile nothing."""
    model, counter = make("gru"), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for seq_len, batch in [(5, 4), (9, 6), (11, 8), (30, 3), (8, 17)]:
            assert_same(compiled, model, torch.randn(seq_len, batch, 3), training=False)
    assert len(counter.graphs) <= 2


def rnnfast_ops(graph: list[str]) -> list[str]:
    return sorted(op.removeprefix("rnnfast.").removesuffix(".default") for op in graph if op.startswith("rnnfast."))


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_one_operator_per_layer_whatever_the_length(cell):
    """The graph does not grow with T, so neither does the time to compile it."""
    name, sizes = cell.removesuffix("_tanh"), set()
    for seq_len in (3, 500):
        torch._dynamo.reset()
        counter = Counter(aot=True)
        model = make(cell, layers=2)
        compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
        output, _ = compiled(torch.randn(seq_len, 2, 3))
        output.sum().backward()
        forward, backward = counter.graphs
        assert rnnfast_ops(forward) == [f"{name}_fwd"] * 2
        assert rnnfast_ops(backward) == [f"{name}_bwd"] * 2
        with torch.no_grad():
            compiled(torch.randn(seq_len, 2, 3))
        assert rnnfast_ops(counter.graphs[-1]) == [f"{name}_infer"]  # the whole stack
        sizes.add(tuple(len(graph) for graph in counter.graphs))
    assert len(sizes) == 1


@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_lengths(cell):
    model = make(cell, bidirectional=True).recurrent
    counter = Counter()
    compiled = torch.compile(
        lambda x, lengths: model(x, lengths=lengths), fullgraph=True, backend=counter, dynamic=True
    )
    for seq_len, batch in [(5, 7), (8, 3)]:
        x, lengths = torch.randn(seq_len, batch, 4), torch.randint(0, seq_len + 1, (batch,))
        for actual, expected in zip(tensors(compiled(x, lengths)), tensors(model(x, lengths=lengths)), strict=True):
            torch.testing.assert_close(actual, expected)
    assert len(counter.graphs) == 1


def test_functional_and_unbatched():
    case = Case("lstm", 1, 1, 4, 6)
    weights = [p.detach() for p in harness.make_module(torch.nn, case).parameters()]
    compiled = torch.compile(lambda x: rnnfast.functional.lstm(x, None, weights), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 4)
    torch.testing.assert_close(compiled(x), rnnfast.functional.lstm(x, None, weights))
    module = harness.make_module(rnnfast, case)
    unbatched = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(unbatched(x[:, 0]), module(x[:, 0]))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_tensor_as_both_states(training):
    """lstm(x, (zeros, zeros)): Dynamo refuses an autograd.Function that is given one tensor twice."""
    model = make("lstm").recurrent
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    zeros = torch.zeros(1, 3, 6)
    with torch.set_grad_enabled(training):
        assert_same(compiled, model, torch.randn(5, 3, 4), (zeros, zeros), training=training)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(name):
    cell, counter = getattr(rnnfast, name)(4, 6), Counter()
    compiled = torch.compile(cell, fullgraph=True, backend=counter)
    x = torch.randn(3, 4)
    torch.testing.assert_close(compiled(x), cell(x))
    assert len(counter.graphs) == 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_inductor(cell):
    """The default backend, training, two shapes."""
    model = make(cell, bidirectional=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for seq_len, batch in [(5, 4), (9, 3)]:
        assert_same(compiled, model, torch.randn(seq_len, batch, 3), training=True)


def test_training_steps_follow_the_weights():
    """Compiled once; an optimizer changes the weights in place; each step equals the eager one's."""
    torch.manual_seed(3)
    eager, twin = make("gru"), make("gru")
    twin.load_state_dict(eager.state_dict())
    compiled, losses = torch.compile(twin, fullgraph=True, backend="aot_eager"), []
    for model, function in ((eager, eager), (twin, compiled)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        own = []
        for step in range(5):
            x = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(step))
            loss = function(x)[0].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own.append(float(loss))
        losses.append(own)
    assert losses[0][0] > losses[0][-1]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


@pytest.mark.parametrize("package", [torch.nn, rnnfast], ids=["torch.nn", "rnnfast"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_stock_modules_are_refused_as_before(name, package):
    """Dynamo breaks the graph at torch.nn's classes and still does after having traced ours, which it takes whole."""
    ours = rnnfast.GRU(2, 3)
    torch.compile(ours, fullgraph=True, backend="eager")(torch.randn(2, 1, 2))
    module = getattr(package, name)(2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    if package is rnnfast:
        compiled(torch.randn(2, 1, 2))
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            compiled(torch.randn(2, 1, 2))
    assert torch._dynamo.config.allow_rnn is False


def test_mixed_model_keeps_the_stock_refusal():
    """A stock module beside one of ours in a model is refused still."""

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ours, self.theirs = rnnfast.GRU(2, 3), torch.nn.GRU(3, 3)

        def forward(self, x):
            return self.theirs(self.ours(x)[0])[0]

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Mixed(), fullgraph=True, backend="eager")(torch.randn(2, 1, 2))


@pytest.mark.quick(0)
@pytest.mark.parametrize("first", ["rnnfast", "torch._dynamo"])
def test_import_order_and_cost(first):
    """Importing rnnfast imports no Dynamo (seconds); tracing works whichever came first."""
    program = f"""
import sys, torch
import {first}
if "{first}" == "rnnfast":
    rnnfast.LSTM(2, 3)(torch.zeros(1, 1, 2))
    assert "torch._dynamo" not in sys.modules, "rnnfast imported torch._dynamo"
import rnnfast
module = rnnfast.LSTM(2, 3)
torch.compile(module, fullgraph=True, backend="eager")(torch.zeros(4, 1, 2))
print("traced")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["traced"], done.stderr[-2000:]
