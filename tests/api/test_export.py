"""rnnfast modules through torch.jit, torch.export, ONNX, torch.fx and dynamic quantization: all as with torch.nn.

All of these get torch's own operators, so that the result runs where rnnfast is not installed.
"""

import io
import pickle

import pytest
import torch
from support.twins import CELLS, LAYERS, assert_bitwise, assert_same, gradients, state_of, tensors, total, twins
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
KINDS = [*LAYERS, *CELLS]
DEEP = {"num_layers": 2, "bidirectional": True}


def sample(kind, seq_len=5, batch=2):
    return torch.randn(batch, 3) if kind in CELLS else torch.randn(seq_len, batch, 3)


class Tagger(nn.Module):
    """A recurrent layer and a readout."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.layer(x)
        return self.readout(output)


class CellLoop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        for i in range(x.size(0)):
            h = self.cell(x[i], h)
        return h


def taggers(kind):
    """(ours, theirs) with equal weights."""
    torch.manual_seed(0)
    ours, theirs = (Tagger(module) for module in twins(kind, **DEEP))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


def operators(graph):
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


# ------------------------------------------------ torch.jit.script


class PassOn(nn.Module):
    """torch.jit.script compiles torch.nn's layers inside a model only; one class per kind of state."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hx: Tensor):
        return self.layer(x, hx)


class PassOnTwo(PassOn):
    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]):
        return self.layer(x, hx)


@pytest.mark.parametrize("kind", KINDS)
def test_script(kind):
    ours, theirs = twins(kind, **({} if kind in CELLS else DEEP))
    scripted = torch.jit.script((PassOnTwo if "lstm" in kind else PassOn)(ours))
    hx = state_of(theirs, 2)
    for x in (sample(kind), sample(kind, 9)):
        assert_same(scripted(x, hx), theirs(x, hx))
    total(scripted(x, hx)).backward()
    total(theirs(x, hx)).backward()
    assert_same(gradients(ours), gradients(theirs))
    with torch.no_grad():
        for module in (ours, theirs):
            for parameter in module.parameters():
                parameter.mul_(-1.5)
    assert_same(scripted(x, hx), theirs(x, hx), "the scripted module has the live module's parameters")
    assert_same(ours(x, hx), theirs(x, hx), "the live module is as before")


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_script_in_a_model_saved_and_loaded(kind):
    ours, theirs = taggers(kind)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for seq_len, batch in ((5, 2), (9, 3)):
        x = sample(kind, seq_len, batch)
        assert_same(loaded(x), theirs(x))
    assert_bitwise(loaded.state_dict(), ours.state_dict())
    assert_same(ours(x), theirs(x))
    assert "rnnfast::" not in str(loaded.inlined_graph)


def test_script_packed():
    class Packed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x: PackedSequence) -> Tensor:
            output, _ = self.layer(x)
            return output.data

    ours, theirs = twins("lstm")
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([2, 5]), enforce_sorted=False)
    assert_same(torch.jit.script(Packed(ours))(packed), theirs(packed)[0].data)


@pytest.mark.parametrize("kind", ["rnncell_tanh", "grucell"])
def test_script_cell_in_a_loop(kind):
    ours, theirs = (CellLoop(module) for module in twins(kind))
    scripted, h = torch.jit.script(ours), torch.randn(2, 4)
    for seq_len in (3, 7):
        x = torch.randn(seq_len, 2, 3)
        assert_same(scripted(x, h), theirs(x, h))


def test_script_of_a_parametrized_layer():
    ours, theirs = twins("gru")
    x, hx = sample("gru"), state_of(theirs, 2)
    for module in (ours, theirs):
        nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    assert_same(torch.jit.script(PassOn(ours))(x, hx), torch.jit.script(PassOn(theirs))(x, hx))
    assert_same(ours(x, hx), theirs(x, hx))


# ------------------------------------------------ torch.jit.trace


@pytest.mark.parametrize("kind", KINDS)
def test_trace_takes_other_lengths(kind):
    ours, theirs = twins(kind, **({} if kind in CELLS else DEEP))
    traced = torch.jit.trace(ours, (sample(kind), state_of(theirs, 2)))
    for seq_len, batch in ((5, 2), (9, 3), (1, 1)):
        x, hx = sample(kind, seq_len, batch), state_of(theirs, batch)
        assert_same(traced(x, hx), theirs(x, hx))
    assert "rnnfast::" not in str(traced.inlined_graph)
    total(traced(x, hx)).backward()
    total(theirs(x, hx)).backward()
    assert_same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("kind", ["rnn_relu", "gru", "lstm"])
def test_trace_of_a_model_without_hx_saved_and_loaded(kind):
    ours, theirs = taggers(kind)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(ours, sample(kind)), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for seq_len, batch in ((5, 2), (9, 3), (1, 1)):
        x = sample(kind, seq_len, batch)
        assert_same(loaded(x), theirs(x))


# ------------------------------------------------ torch.export


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "grucell", "lstmcell"])
def test_export(kind):
    ours, theirs = twins(kind)
    args = (sample(kind), state_of(theirs, 2))
    program = torch.export.export(ours, args)
    found = operators(program.graph)
    assert found >= operators(torch.export.export(theirs, args).graph)
    assert not any("rnnfast" in name for name in found)
    args = (sample(kind), state_of(theirs, 2))
    assert_same(tensors(program.module()(*args)), tensors(theirs(*args)))


def test_strict_export():
    ours, theirs = twins("gru")
    args = (sample("gru"), state_of(theirs, 2))
    program = torch.export.export(ours, args, strict=True)
    assert not any("rnnfast" in name for name in operators(program.graph))
    assert_same(tensors(program.module()(*args)), tensors(theirs(*args)))


def test_export_with_a_dynamic_batch_saved_and_loaded(tmp_path):
    ours, theirs = twins("gru", batch_first=True)
    program = torch.export.export(ours, (torch.randn(2, 5, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "gru.pt2")
    loaded = torch.export.load(tmp_path / "gru.pt2").module()
    for batch in (2, 7):
        x = torch.randn(batch, 5, 3)
        assert_same(tensors(loaded(x)), tensors(theirs(x)))


# ------------------------------------------------ ONNX


def run_onnx(path, **inputs):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    results = session.run(None, dict(zip(names, (t.numpy() for t in inputs.values()), strict=True)))
    return [torch.from_numpy(result) for result in results]


@pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_onnx_of_the_tracing_exporter(kind, tmp_path):
    """One ONNX node per layer, free in length and batch."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    ours, theirs = taggers(kind)
    torch.onnx.export(
        ours,
        (sample(kind),),
        tmp_path / "model.onnx",
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "time", 1: "batch"}},
    )
    for seq_len, batch in ((5, 2), (9, 3)):
        x = sample(kind, seq_len, batch)
        (result,) = run_onnx(tmp_path / "model.onnx", x=x)
        torch.testing.assert_close(result, theirs(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_onnx_of_the_dynamo_exporter(kind, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    ours, theirs = twins(kind)
    args = (sample(kind), state_of(theirs, 2))
    torch.onnx.export(ours, args, tmp_path / "model.onnx", dynamo=True, verbose=False)
    flat = tensors(args)
    results = run_onnx(tmp_path / "model.onnx", **{str(i): t for i, t in enumerate(flat)})
    for result, expected in zip(results, tensors(theirs(*args)), strict=True):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------ torch.fx


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_fx_symbolic_trace(kind):
    ours, theirs = taggers(kind)
    traced = torch.fx.symbolic_trace(ours)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer", "readout"]
    x = sample(kind, 9, 3)
    assert_same(traced(x), theirs(x))
    revived = pickle.loads(pickle.dumps(traced))
    assert_same(revived(x), theirs(x))
    assert traced.layer is ours.layer


class WithState(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *states):
        return self.layer(x, hx=states if len(states) == 2 else states[0])


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnncell_tanh", "grucell", "lstmcell"])
def test_fx_with_state(kind):
    ours, theirs = (WithState(module) for module in twins(kind))
    x, states = sample(kind), tensors(state_of(theirs.layer, 2))

    class Fixed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, h, c):
            return self.inner(x, h, c) if len(states) == 2 else self.inner(x, h)

    traced = torch.fx.symbolic_trace(Fixed(ours))
    args = (x, states[0], states[-1])
    assert_same(tensors(traced(*args)), tensors(Fixed(theirs)(*args)))
    assert any(node.op == "call_module" and node.target == "inner.layer" for node in traced.graph.nodes)


# ------------------------------------------------ quantization


def test_dynamic_quantization_after_revert():
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        pytest.skip("this torch has no quantized engine (fbgemm, x86, onednn or qnnpack)")
    quantize = torch.ao.quantization.quantize_dynamic
    ours, theirs = taggers("lstm")
    reverted = rnnfast.revert(ours, inplace=False)
    assert type(reverted.layer) is nn.LSTM and type(ours.layer) is rnnfast.LSTM
    quantized, expected = (quantize(m, {nn.LSTM, nn.Linear}, torch.qint8) for m in (reverted, theirs))
    assert type(quantized.layer) is type(expected.layer) is torch.ao.nn.quantized.dynamic.LSTM
    x = sample("lstm", 9, 3)
    assert torch.equal(quantized(x), expected(x))
    assert (quantized(x) - theirs(x)).abs().max() < 0.05
