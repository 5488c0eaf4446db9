"""Frozen layers as modules: saved, loaded, copied, compiled, exported, traced, called by many threads, refused."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import harness
from support.frozen_model import FORMATS
from support.harness import CELLS, Case, num_threads
from test_threads import in_child
from torch import Tensor, nn

import rnnfast
from rnnfast import _ext
from rnnfast.freeze import freeze

pytestmark = [
    pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
STACK = {"layers": 2, "bidirectional": True}


class Tagger(nn.Module):
    """What surrounds a recurrent layer in practice."""

    def __init__(self, cell: str, proj: int = 0):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.recurrent = harness.make_module(nn, Case(cell, 1, 1, 6, 9, **STACK, proj=proj))
        self.head = nn.Linear(2 * (proj or 9), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(torch.relu(self.embed(x)))[0])


def taggers():
    return [*((cell, 0) for cell in CELLS), ("lstm", 4)]


every_tagger = pytest.mark.parametrize(("cell", "proj"), taggers())
every_format = pytest.mark.parametrize("weights", FORMATS)


@every_format
@every_tagger
def test_state_dict_round_trip(cell, proj, weights, tmp_path):
    """Through a file that holds tensors alone, into a model with other weights."""
    frozen, other = freeze(Tagger(cell, proj), weights), Tagger(cell, proj)
    for parameter in other.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    other, x = freeze(other, weights), torch.randn(5, 2, 3)
    with torch.no_grad():
        assert not torch.equal(other(x), frozen(x))
        torch.save(frozen.state_dict(), tmp_path / "state.pt")
        assert not other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True)).missing_keys
        assert torch.equal(other(x), frozen(x))
    assert other.state_dict().keys() == frozen.state_dict().keys()
    dtypes = {str(w.dtype)[6:] for name, w in frozen.state_dict().items() if ".weight_" in name and "scale" not in name}
    assert dtypes == {weights}
    assert not [name for name, _ in frozen.recurrent.named_parameters()]


@every_format
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way, weights):
    for frozen in (freeze(Tagger("lstm", 4), weights), freeze(nn.GRUCell(3, 6), weights)):
        buffer = io.BytesIO()
        if way == "torch.save":
            torch.save(frozen, buffer)
        copied = {
            "deepcopy": lambda frozen=frozen: copy.deepcopy(frozen),
            "pickle": lambda frozen=frozen: pickle.loads(pickle.dumps(frozen)),
            "torch.save": lambda buffer=buffer: torch.load(io.BytesIO(buffer.getvalue()), weights_only=False),
        }[way]()
        x = torch.randn(5, 3)
        with torch.no_grad():
            assert torch.equal(copied(x), frozen(x))
        assert str(copied) == str(frozen)


def edited(state: dict, **changes) -> dict:
    """A change is a function of the tensor, or None to drop it."""
    state = dict(state)
    for name, change in changes.items():
        if change is None:
            del state[name]
        else:
            state[name] = change(state.get(name))
    return state


WRONG_STATES = {
    "another-version": ({"format_version": lambda v: v + 1}, "format_version: expected 1, got 2"),
    "missing": ({"bias_ih_l0": None}, "bias_ih_l0"),
    "missing-scale": ({"weight_hh_l0_scale": None}, "weight_hh_l0_scale"),
    "unexpected": ({"weight_ih_l1": lambda _: torch.zeros(1)}, "weight_ih_l1"),
    "cut": ({"weight_ih_l0": lambda w: w[:-1]}, r"weight_ih_l0: expected torch.int8 \[36, 6\]"),
    "float": ({"weight_ih_l0": lambda w: w.float()}, "weight_ih_l0: expected torch.int8"),
    "empty-scale": ({"weight_ih_l0_scale": lambda s: s[:0]}, "weight_ih_l0_scale"),
    "no-tensor": ({"weight_hh_l0": lambda w: w.tolist()}, "weight_hh_l0: expected torch.int8 .* got list"),
    "no-version": ({"format_version": None}, "format_version"),
    "odd-version": ({"format_version": lambda _: torch.tensor([1, 2])}, "format_version"),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_state_dict_changes_nothing(name):
    """The error says what is wrong; the layer keeps its weights."""
    frozen, other, x = (freeze(nn.LSTM(6, 9)) for _ in "12"), freeze(nn.LSTM(6, 9)), torch.randn(3, 2, 6)
    frozen, another = frozen
    before, (changes, message) = frozen(x)[0], WRONG_STATES[name]
    with pytest.raises(RuntimeError, match=message):
        frozen.load_state_dict(edited(other.state_dict(), **changes))
    if name != "unexpected":  # torch.nn loads the expected ones, too
        assert torch.equal(frozen(x)[0], before)
    assert not torch.equal(another(x)[0], before)


def test_a_state_dict_of_another_format_or_size_is_refused():
    frozen = {weights: freeze(nn.GRU(6, 9), weights) for weights in FORMATS}
    for weights, layer in frozen.items():
        for state in [other.state_dict() for name, other in frozen.items() if name != weights]:
            with pytest.raises(RuntimeError):
                layer.load_state_dict(state)
        for other in (nn.GRU(6, 10), nn.GRU(7, 9), nn.LSTM(6, 9), nn.GRU(6, 9, 2), nn.GRU(6, 9, bias=False)):
            with pytest.raises(RuntimeError):
                layer.load_state_dict(freeze(other, weights).state_dict())


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-64],
        lambda packed: packed[:100],
        lambda packed: torch.cat([packed, packed[:64]]),
        lambda packed: torch.cat([packed[:8] ^ 1, packed[8:]]),
        lambda packed: torch.cat([packed[:40], packed[40:41] + 1, packed[41:]]),
    ],
    ids=["truncated", "shorter-than-its-header", "longer", "another-version", "other-sizes"],
)
def test_a_damaged_block_is_refused(damage):
    """By unpickling, and by the operator itself, which reads no byte beyond the block."""
    frozen, x = freeze(nn.LSTM(6, 9)), torch.randn(2, 1, 6)
    frozen.packed = damage(frozen.packed)
    with pytest.raises(RuntimeError, match="packed"):
        frozen(x)
    data = pickle.dumps(frozen)
    with pytest.raises(RuntimeError, match="packed weights: expected the header"):
        pickle.loads(data)


def rnnfast_nodes(targets) -> list[str]:
    return [str(target).split(".")[1] for target in map(str, targets) if "rnnfast" in target]


@every_format
@every_tagger
def test_compile(cell, proj, weights):
    """One graph, one operator for the whole stack, the same numbers."""
    torch._dynamo.reset()
    frozen, graphs = freeze(Tagger(cell, proj), weights), []

    def keep(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(frozen, fullgraph=True, backend=keep, dynamic=True)
    with torch.no_grad():
        for steps, batch in ((5, 2), (8, 3), (12, 4)):
            x = torch.randn(steps, batch, 3)
            assert torch.equal(compiled(x), frozen(x))
    assert len(graphs) == 1
    assert rnnfast_nodes(graphs[0]) == [f"{cell.split('_')[0]}_frozen"]


@every_format
def test_compile_cell(weights):
    torch._dynamo.reset()
    frozen, x, h = freeze(nn.GRUCell(3, 6), weights), torch.randn(2, 3), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(torch.compile(frozen, fullgraph=True, backend="eager")(x, h), frozen(x, h))


@every_format
@every_tagger
def test_export(cell, proj, weights, tmp_path):
    """torch.export with a dynamic batch, saved and loaded."""
    frozen, x = freeze(Tagger(cell, proj), weights), torch.randn(5, 2, 3)
    with torch.no_grad():
        program = torch.export.export(frozen, (x,), dynamic_shapes=({1: torch.export.Dim("batch")},))
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert rnnfast_nodes(targets) == [f"{cell.split('_')[0]}_frozen"]
        torch.export.save(program, tmp_path / "program.pt2")
        loaded, x = torch.export.load(tmp_path / "program.pt2").module(), torch.randn(5, 7, 3)
        assert torch.equal(loaded(x), frozen(x))


@every_format
@every_tagger
def test_trace(cell, proj, weights):
    """torch.jit.trace, saved and loaded, with other lengths than the traced one."""
    frozen, buffer = freeze(Tagger(cell, proj), weights), io.BytesIO()
    with torch.no_grad():
        traced = torch.jit.trace(frozen, torch.randn(5, 2, 3))
        kinds = [node.kind() for node in traced.inlined_graph.nodes() if "rnnfast" in node.kind()]
        assert kinds == [f"rnnfast::{cell.split('_')[0]}_frozen"]
        torch.jit.save(traced, buffer)
        x = torch.randn(9, 4, 3)
        assert torch.equal(torch.jit.load(io.BytesIO(buffer.getvalue()))(x), frozen(x))


@every_format
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, weights):
    """Schema, fake kernels and dynamic shapes, as torch.library checks them."""
    name = cell.split("_")[0]
    for case in (Case(cell, 3, 2, 5, 7, **STACK), Case(cell, 1, 1, 5, 7, hx=False)):
        frozen, data = freeze(harness.make_module(nn, case), weights), harness.Data(case)
        states = (data.hx, data.cx)[: 2 if cell == "lstm" else 1] if case.hx else (None,) * (1 + (cell == "lstm"))
        sizes = (7, 0) if cell == "lstm" else (7,)
        arguments = data.input, *states, frozen.packed, None, None, *sizes, case.layers, case.bidirectional, False
        torch.library.opcheck(getattr(torch.ops.rnnfast, f"{name}_frozen").default, arguments)
        rows = tuple(state if state is None else state[0] for state in states)
        if case.layers == 1:
            step = getattr(torch.ops.rnnfast, f"{name}_step_frozen").default
            torch.library.opcheck(step, (data.input[0], *rows, frozen.packed, 7, False))


@every_format
def test_many_python_threads_call_one_layer(weights):
    case = Case("lstm", 6, 3, 20, 70, layers=2)
    frozen = freeze(harness.make_module(nn, case), weights)
    inputs = [torch.randn(6, 3, 20) for _ in range(40)]
    for threads in (1, 2):
        with num_threads(threads):
            expected = [frozen(x)[0] for x in inputs]
            with ThreadPoolExecutor(8) as pool:
                for one, other in zip(pool.map(lambda x: frozen(x)[0], inputs), expected, strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=0 if weights == "int8" else 1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing on this platform")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@every_format
def test_a_forked_child_works(weights):
    case = Case("gru", 12, 8, 40, 130, layers=2)
    frozen, x = freeze(harness.make_module(nn, case), weights), torch.randn(12, 8, 40)
    with num_threads(2), torch.no_grad():
        expected = frozen(x)[0]
        assert in_child(lambda: torch.allclose(frozen(x)[0], expected, atol=1e-5)) == 0


def test_a_frozen_layer_is_for_inference():
    frozen, x = freeze(Tagger("lstm")), torch.randn(3, 2, 6)
    with pytest.raises(RuntimeError, match="cannot be trained"):
        frozen.train()
    assert frozen.recurrent.train(False) is frozen.recurrent and not frozen.recurrent.training
    layer, state = frozen.recurrent, torch.zeros(4, 2, 9, requires_grad=True)
    packed = nn.utils.rnn.pack_sequence([x[:, 0].clone().requires_grad_()])
    for arguments in ((x.clone().requires_grad_(),), (x, (state, state.detach())), (packed,)):
        with pytest.raises(RuntimeError, match="no gradients"):
            layer(*arguments)
        with torch.no_grad():
            layer(*arguments)
    with pytest.raises(RuntimeError, match="no gradients"):
        freeze(nn.GRUCell(3, 4))(torch.randn(2, 3, requires_grad=True))


def test_dropout_is_off():
    """As in eval mode, whatever mode the layer was in."""
    layer, x = nn.LSTM(6, 9, 3, dropout=0.5), torch.randn(3, 2, 6)
    assert layer.training
    frozen = freeze(layer, "float32")
    with torch.no_grad():
        torch.testing.assert_close(frozen(x)[0], layer.eval()(x)[0], rtol=1e-4, atol=1e-6)


MEMORY = """
import gc, sys, torch
from torch import nn
from rnnfast.freeze import freeze
def resident():
    gc.collect()
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
torch.set_num_threads(1)
freeze(nn.LSTM(4, 4))(torch.randn(1, 1, 4))
before = resident()
layer = nn.LSTM(1536, 1536, 2)
of_float = resident() - before
frozen = freeze(layer)
del layer
with torch.no_grad():
    frozen(torch.randn(20, 4, 1536))
print(of_float, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_resident_memory_of_int8():
    """At most 0.30 of the float32 layer's, the memory of a call included."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    of_float, of_int8 = map(float, done.stdout.split())
    assert of_float > 140 and of_int8 <= 0.30 * of_float, done.stdout


def test_explain_names_the_format_and_the_kernel():
    frozen, x = freeze(nn.LSTM(6, 9)), torch.randn(3, 2, 6)
    told = rnnfast.explain(frozen, x)
    assert told.backend == "cpu" and "int8 weights, packed once; kernel " in str(told)
    assert "bfloat16 weights" in str(rnnfast.explain(freeze(nn.GRUCell(6, 9), "bfloat16"), x[0]))
