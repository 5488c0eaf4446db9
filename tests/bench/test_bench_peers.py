"""The peers' adapters, as far as they can be tested without a GPU and without their code.

What a peer computes, its layout and its interface stand here once more in plain torch, as read in its source: stand-ins
that a made-up checkout brings in under the peer's names.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import parity, peers
from bench.cases import Case, new_module
from bench.providers import Problem

PEERS = {peer.name: peer for peer in peers.PEERS}


def lstm_cell(c, i, f, g, o):
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(h, r, z, n, h_n):
    """n and h_n: what x and h bring to the candidate."""
    z = torch.sigmoid(z)
    return z * h + (1 - z) * torch.tanh(n + torch.sigmoid(r) * h_n)


def torch_lstm(x, h, c, w_ih, w_hh, b_ih, b_hh):
    """x [T, B, I] -> all h, all c."""
    steps = []
    for row in x:
        h, c = lstm_cell(c, *(row @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh).chunk(4, 1))
        steps.append((h, c))
    return [torch.stack(states) for states in zip(*steps, strict=True)]


def fastlstm_apply(x, h_0, c_0, w_ih, b_ih, w_hh, b_hh):
    h = x.new_zeros(x.shape[1], w_hh.shape[1])
    output, cells = torch_lstm(x, h, h, w_ih, w_hh, b_ih, b_hh)
    return output, (output[-1], cells[-1])


def lstm_triton(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, *, input_precision):
    """Batch first; a state for every step, used where is_init is set and at step 0."""
    assert not is_init.any() and is_init.shape == x.shape[:2] and hidden.shape[:2] == x.shape[:2]
    assert torch.backends.cuda.matmul.allow_tf32 == (input_precision == "tf32")  # raises where switches differ
    states = torch_lstm(x.transpose(0, 1), hidden[:, 0], cell[:, 0], w_ih, w_hh, b_ih, b_hh)
    return [s.transpose(0, 1) for s in states] + [s[-1] for s in states]


def gru_triton(x, hidden, w_ih, w_hh, b_ih, b_hh, is_init, *, input_precision):
    h, output = hidden[:, 0], []
    for row in x.unbind(1):
        (r, z, n), (h_r, h_z, h_n) = (row @ w_ih.t() + b_ih).chunk(3, 1), (h @ w_hh.t() + b_hh).chunk(3, 1)
        h = gru_cell(h, r + h_r, z + h_z, n, h_n)
        output.append(h)
    return torch.stack(output, 1), h


def haste_lstm(training, zoneout, x, h, c, kernel, recurrent_kernel, bias, mask):
    """Gates i g f o; the states before the first step too."""
    assert mask.numel() == 0 and zoneout == 0
    hs, cs = [h], [c]
    for row in x:
        i, g, f, o = (row @ kernel + hs[-1] @ recurrent_kernel + bias).chunk(4, 1)
        for states, state in zip((hs, cs), lstm_cell(cs[-1], i, f, g, o), strict=True):
            states.append(state)
    return torch.stack(hs), torch.stack(cs)


def haste_gru(training, zoneout, x, h, kernel, recurrent_kernel, bias, recurrent_bias, mask):
    """Gates z r n."""
    hs = [h]
    for row in x:
        z, r, n = (row @ kernel + bias).chunk(3, 1)
        h_z, h_r, h_n = (hs[-1] @ recurrent_kernel + recurrent_bias).chunk(3, 1)
        hs.append(gru_cell(hs[-1], r + h_r, z + h_z, n, h_n))
    return torch.stack(hs)


def flashrnn(product, r, bias, function, backend, dtype):
    """[B, T, gates, heads, D], [gates, heads, D, D], [gates, heads, D] -> states [states, B, T, heads, D]; 1 head."""
    assert (function == "gru") == (backend == "cuda") and dtype == "float32"
    steps, (r, bias) = [], (r[:, 0], bias[:, 0])
    h = c = product.new_zeros(product.shape[0], product.shape[-1])
    for row in product[:, :, :, 0].unbind(1):
        recurrent = torch.einsum("gdp,bp->bgd", r, h)
        if function == "gru":  # recurrent: n r z; x: r z n; biases: recurrent n, r, z, n of x
            (h_n, h_r, h_z), (x_r, x_z, x_n) = recurrent.unbind(1), row.unbind(1)
            h = gru_cell(h, x_r + h_r + bias[1], x_z + h_z + bias[2], x_n + bias[3], h_n + bias[0])
        elif function == "lstm":
            h, c = lstm_cell(c, *(row + recurrent + bias).unbind(1))
        else:
            h = torch.tanh(row + recurrent + bias)[:, 0]
        steps.append(torch.stack([h, c] if function == "lstm" else [h]))
    return torch.stack(steps, 2).unsqueeze(3), None


CHECKOUTS = {
    "fastlstm/fastlstm/lstm.py": """
import torch
from flashrnn import flashrnn
torch.backends.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
class LSTMfn: apply = staticmethod(stand_ins.fastlstm_apply)
""",
    "flashrnn/flashrnn/__init__.py": "from .flashrnn import flashrnn",
    "flashrnn/flashrnn/flashrnn/__init__.py": "from .flashrnn import flashrnn",
    "flashrnn/flashrnn/flashrnn/flashrnn.py": "flashrnn = stand_ins.flashrnn",
    "haste/haste_pytorch_lib.py": "",
    "haste/frameworks/pytorch/lstm.py": "class LSTMFunction: apply = staticmethod(stand_ins.haste_lstm)",
    "haste/frameworks/pytorch/gru.py": "class GRUFunction: apply = staticmethod(stand_ins.haste_gru)",
    "torchrl/torchrl/modules/tensordict_module/_rnn_precision.py": "known = ()",
    "torchrl/torchrl/modules/tensordict_module/_rnn_triton.py": """
from torchrl.modules.tensordict_module._rnn_precision import known
lstm_triton, gru_triton = stand_ins.lstm_triton, stand_ins.gru_triton
""",
    "flaggems/src/flag_gems/ops/lstm.py": "import torch; lstm = torch.lstm",
}


THEIRS = (
    "fastlstm",
    "flashrnn",
    "haste_pytorch_lib",
    "pytorch",
    "torchrl",
    "_rnn_precision",
    "_rnn_triton",
    "flag_gems",
)


@pytest.fixture
def checkouts(monkeypatch, tmp_path):
    for name, text in CHECKOUTS.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("import peers_stand_ins as stand_ins\n" + text)
    monkeypatch.setenv("RNNFAST_PEERS", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "peers_stand_ins", sys.modules[__name__])
    facts = SimpleNamespace(regs_per_multiprocessor=1, multi_processor_count=1, shared_memory_per_block_optin=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(peers.Peer, "takes", lambda peer, case: next(r for r in peer.ranges if r.has(case)))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in THEIRS]:
        del sys.modules[name]
    torch.backends.cuda.matmul.allow_tf32 = False  # both the old switch and the new; the new as it was
    torch.backends.cuda.matmul.fp32_precision = "none"


def results_of(name: str, case: Case) -> dict[str, torch.Tensor]:
    with torch.set_grad_enabled(case.has_gradients):
        problem = Problem(case)
        module = new_module(nn, case).to(problem.input)
        module.load_state_dict(problem.state)
        runner = peers.PeerRunner(PEERS[name], module, problem)
        results = runner.run()
        for timed, result in zip(runner.timed(), list(results.values())[:2], strict=False):
            torch.testing.assert_close(runner._turned(timed), result)
    assert not problem.input.requires_grad  # others use it too
    return results


CASES = [
    ("fastlstm", "LSTM", "tf32"),
    ("torchrl", "LSTM", "tf32"),
    ("torchrl", "GRU", "ieee"),
    ("flaggems", "LSTM", "ieee"),
]
CASES += [
    ("haste", "LSTM", "ieee"),
    ("haste", "GRU", "tf32"),
    *(("flashrnn", c, "tf32") for c in ("LSTM", "GRU", "RNN")),
]


@pytest.mark.parametrize("name, cell, precision", CASES)
def test_weights_are_laid_out_as_the_peer_reads_them(checkouts, name, cell, precision):
    stacked = {"num_layers": 2, "bidirectional": True} if name == "flaggems" else {}
    for mode in ("inference",) if stacked else ("inference", "training"):
        case = Case(cell, mode, 32, 3, 7, f"fp32-{precision}", seq_len=4, **stacked)
        results = results_of(name, case)
        assert len(results) == (6 if mode == "training" else 1) and parity.check_ceiling(case, results) is None


def test_a_wrong_layout_is_found(checkouts, monkeypatch):
    monkeypatch.setattr(peers, "reordered", lambda w, order: w)
    case = Case("GRU", "inference", 32, 3, 7, "fp32-tf32", seq_len=4)
    assert "output: error" in parity.check_ceiling(case, results_of("haste", case))


def test_importing_fastlstm_changes_nothing_else(checkouts):
    backends = torch.backends
    switches = backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    results_of("fastlstm", Case("LSTM", "inference", 16, 2, dtype="fp32-tf32", seq_len=2))
    assert [switch.fp32_precision for switch in switches] == before and "flashrnn" not in sys.modules


def test_what_each_peer_takes():
    case = Case("LSTM", "training", 256, 16, dtype="bf16", seq_len=512, device="cuda")

    def takers(**changes):
        found = {name: peer.takes(replace(case, **{"input_size": 64} | changes)) for name, peer in PEERS.items()}
        return {name: taken.backend for name, taken in found.items() if taken}

    assert takers() == {"fastlstm": "", "flashrnn": "cuda_fused"}
    assert takers(device="cpu") == takers(form="packed") == takers(proj_size=64) == takers(bidirectional=True) == {}
    small = {"hidden_size": 64, "input_size": 65}
    assert takers(**small) == {"flashrnn": "cuda_fused"} and takers(cell="GRU") == {"flashrnn": "cuda"}
    assert takers(**small, mode="inference")["flashrnn"] == "triton_fused" and takers(hidden_size=129) == {
        "fastlstm": ""
    }
    assert takers(**small, dtype="fp32-tf32")["flashrnn"] == "triton_fused" and takers(hidden_size=32) == {
        "flashrnn": "cuda_fused"
    }
    assert set(takers(mode="inference")) == {"fastlstm", "flashrnn", "flaggems"}
    assert set(takers(mode="inference", num_layers=2, bidirectional=True)) == {"flaggems"}
    assert set(takers(dtype="fp32-tf32")) == {"fastlstm", "flashrnn", "haste", "torchrl"}
    assert (
        set(takers(dtype="fp32-ieee"))
        == {"haste", "torchrl"}
        == set(takers(dtype="fp32-tf32", hidden_size=96))
        - {
            "fastlstm",
            "flashrnn",
        }
    )
    assert set(takers(dtype="fp32-tf32", hidden_size=1024)) == {"fastlstm", "flashrnn", "haste"}
    assert set(takers(dtype="fp16", cell="GRU")) == {"flashrnn", "haste"} and takers(mode="forward") == {}


def test_what_is_missing(checkouts, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fastlstm, flaggems, haste = PEERS["fastlstm"], PEERS["flaggems"], PEERS["haste"]
    assert fastlstm.missing() is None and fastlstm.version() == "unknown commit"
    (tmp_path / "fastlstm" / "COMMIT").write_text("0123456789abcdef\n")
    assert fastlstm.version() == "0123456789ab"
    assert "not built, haste_pytorch_lib*.so" in haste.missing()
    assert "needs no_such_module" in replace(flaggems, needs=("no_such_module",)).missing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastlstm.missing() == "no CUDA device"
    monkeypatch.setenv("RNNFAST_PEERS", str(tmp_path / "elsewhere"))
    assert all("no checkout at" in peer.missing() for peer in peers.PEERS) and peers.present() == []
