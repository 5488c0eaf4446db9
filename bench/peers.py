"""Peers on a GPU: other people's kernels on the same weights, from untracked checkouts. See docs/peers.md.

An adapter says which cases its peer takes, lays torch.nn's parameters out as the peer wants them, and calls it. The
peers come in no other way: none is a dependency, and none of their code is in this repository.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cases import GATES, MODES, Case
from .providers import Problem

Forward = Callable[..., Tensor]  # (input, *weights), both as the peer wants them -> output
ANY_SIZE = 1 << 20


def folder() -> Path:
    """Where the checkouts lie, each in a folder of the peer's name."""
    return Path(os.environ.get("RNNFAST_PEERS") or Path(__file__).parent / "checkouts")


@dataclass(frozen=True)
class Range:
    """Cases that a peer takes, and the file of its checkout that says so. No peer takes unequal lengths or projections.

    backend: which of the peer's own; wide_input: more features than units; stacked: several layers and directions."""

    source: str
    cells: tuple[str, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...] = MODES
    hidden: Collection[int] = range(1, ANY_SIZE)
    backend: str = ""
    wide_input: bool = True
    stacked: bool = False

    def has(self, case: Case) -> bool:
        kind = case.cell in self.cells and case.dtype in self.dtypes and case.mode in self.modes
        sizes = case.hidden_size in self.hidden and (self.wide_input or case.input_size <= case.hidden_size)
        plain = self.stacked or (case.num_layers == 1 and not case.bidirectional)
        return kind and sizes and plain and case.form == "padded" and not case.proj_size


@dataclass(frozen=True)
class Peer:
    """layout: torch's parameters in their order -> the peer's, differentiably; load: imports it, returns its call."""

    name: str
    ranges: tuple[Range, ...]
    layout: Callable[..., list[Tensor]]
    load: Callable[[Case, torch.device, str], Forward]
    needs: tuple[str, ...] = ()  # modules
    built: tuple[str, ...] = ()  # what a build leaves in the checkout
    batch_first: bool = False

    def missing(self) -> str | None:
        """Why it is absent, or None."""
        checkout = folder() / self.name
        if not checkout.is_dir():
            return f"no checkout at {checkout}"
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"needs {' and '.join(absent)}"
        unbuilt = [pattern for pattern in self.built if not list(checkout.glob(pattern))]
        if unbuilt:
            return f"not built, {' and '.join(unbuilt)} absent: see docs/peers.md"
        return None if torch.cuda.is_available() else "no CUDA device"

    def version(self) -> str:
        """What its file COMMIT says, which is written when the checkout is placed."""
        file = folder() / self.name / "COMMIT"
        return file.read_text().strip()[:12] if file.exists() else "unknown commit"

    def takes(self, case: Case) -> Range | None:
        return next((among for among in self.ranges if among.has(case)), None) if case.device == "cuda" else None


class PeerRunner:
    """A peer on one problem, as providers.Runner: `run()` returns named results, `timed` is a call without the names.

    The peer's own layout is made beforehand, as its users hold it; `run` goes through it to torch's parameters.
    """

    def __init__(self, peer: Peer, module: nn.Module, problem: Problem) -> None:
        self.peer, self.case = peer, problem.case
        self.forward = peer.load(self.case, problem.input.device, peer.takes(self.case).backend)
        self.parameters = {name: w.detach().clone() for name, w in module.named_parameters()}
        self.input = self._turned(problem.input).clone(memory_format=torch.contiguous_format)
        self.grad_output = self._turned(problem.grad_output).contiguous()
        self.weights = [w.detach() for w in self._laid_out()]
        for tensor in (self.input, *self.weights, *self.parameters.values()):
            tensor.requires_grad_(self.case.has_gradients)

    def _turned(self, x: Tensor) -> Tensor:
        """[T, B, ...] to the peer's order, and back."""
        return x.transpose(0, 1) if self.peer.batch_first else x

    def _laid_out(self) -> list[Tensor]:
        return self.peer.layout(self.case, *self.parameters.values())

    def timed(self) -> object:
        return self._call(self.weights, self.weights)

    def _call(self, weights: list[Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        output = self.forward(self.input, *weights)
        if not self.case.has_gradients:
            return (output,)
        return output, *torch.autograd.grad(output, [self.input, *leaves], self.grad_output)

    def run(self) -> dict[str, Tensor]:
        names = ["output", "grad_input", *(f"grad_{name}" for name in self.parameters)]
        results = dict(zip(names, self._call(self._laid_out(), list(self.parameters.values())), strict=False))
        return results | {name: self._turned(results[name]) for name in names[:2] if name in results}


def present() -> list[Peer]:
    return [peer for peer in PEERS if peer.missing() is None]


def reordered(w: Tensor, order: tuple[int, ...]) -> Tensor:
    """The rows of the gates [gates H, ...] in another order, given as places in torch's (i f g o; r z n)."""
    return w.unflatten(0, (len(order), -1))[list(order)].flatten(0, 1)


def as_torch(case: Case, *parameters: Tensor) -> list[Tensor]:
    return list(parameters)


def haste_layout(case: Case, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> list[Tensor]:
    """[inputs, gates H], gates i g f o or z r n; one bias in the LSTM."""
    order = (0, 2, 1, 3) if case.cell == "LSTM" else (1, 0, 2)
    w_ih, w_hh, b_ih, b_hh = (reordered(w, order) for w in (w_ih, w_hh, b_ih, b_hh))
    return [w_ih.t().contiguous(), w_hh.t().contiguous(), *([b_ih + b_hh] if case.cell == "LSTM" else [b_ih, b_hh])]


def flashrnn_layout(case: Case, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> list[Tensor]:
    """W_ih as it is, R [gates, 1 head, H, H], bias [gates, 1 head, H].

    The GRU's R has n first, and its four biases are those of W_hn h, of r, of z and of W_in x."""
    bias, hidden = b_ih + b_hh, case.hidden_size
    if case.cell == "GRU":
        w_hh = reordered(w_hh, (2, 0, 1))
        bias = torch.cat([b_hh[2 * hidden :], bias[: 2 * hidden], b_ih[2 * hidden :]])
    return [w_ih, w_hh.reshape(-1, 1, hidden, hidden), bias.reshape(-1, 1, hidden)]


def _import(path: str, name: str) -> ModuleType:
    """The module `name` from a folder among the checkouts."""
    if str(folder() / path) not in sys.path:
        sys.path.append(str(folder() / path))
    return importlib.import_module(name)


def load_fastlstm(case: Case, device: torch.device, backend: str) -> Forward:
    """Its import turns TF32 on everywhere, and imports FlashRNN for its own comparisons only; neither stays."""
    backends = torch.backends
    switches = backends, backends.cudnn, backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    flashrnn = sys.modules.get("flashrnn")
    sys.modules["flashrnn"] = SimpleNamespace(flashrnn=None)
    try:
        lstm = _import("fastlstm", "fastlstm.lstm")
    finally:
        del sys.modules["flashrnn"]
        if flashrnn is not None:
            sys.modules["flashrnn"] = flashrnn
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    return lambda x, w_ih, w_hh, b_ih, b_hh: lstm.LSTMfn.apply(x, None, None, w_ih, b_ih, w_hh, b_hh)[0]


def load_torchrl(case: Case, device: torch.device, backend: str) -> Forward:
    """The two files of its Triton backend alone: the whole package needs others."""
    path = "torchrl/torchrl/modules/tensordict_module"
    sys.modules["torchrl.modules.tensordict_module._rnn_precision"] = _import(path, "_rnn_precision")
    call = getattr(_import(path, "_rnn_triton"), f"{case.cell.lower()}_triton")
    shape = case.batch, case.seq_len
    # What h, and c, are where `is_init` is set; at step 0 the initial state.
    states = [torch.zeros(*shape, case.hidden_size, device=device)] * (2 if case.cell == "LSTM" else 1)
    is_init = torch.zeros(shape, dtype=torch.bool, device=device)
    precision = case.dtype.removeprefix("fp32-")
    # It reads this old switch, and torch refuses that where the new one, float32_products', says otherwise.
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    return lambda x, *weights: call(x, *states, *weights, is_init, input_precision=precision)[0]


def load_haste(case: Case, device: torch.device, backend: str) -> Forward:
    _import("haste", "haste_pytorch_lib")
    function = getattr(_import("haste/frameworks", f"pytorch.{case.cell.lower()}"), f"{case.cell}Function")
    like = {"dtype": torch.float16 if case.dtype == "fp16" else torch.float32, "device": device}
    states = [torch.zeros(case.batch, case.hidden_size, **like)] * (2 if case.cell == "LSTM" else 1)
    no_zoneout = torch.empty(0, 0, 0, **like)

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        steps = function.apply(case.has_gradients, 0.0, x, *states, *weights, no_zoneout)
        return (steps[0] if case.cell == "LSTM" else steps)[1:]

    return forward


def load_flashrnn(case: Case, device: torch.device, backend: str) -> Forward:
    """The product with W_ih is its caller's."""
    flashrnn = _import("flashrnn", "flashrnn.flashrnn.flashrnn")
    # Its own reader of these facts names fields that CUDA 13 has no more, and does not compile.
    facts = torch.cuda.get_device_properties(device)
    flashrnn.get_gpu_info = lambda device_id: {
        "maxThreadsPerBlock": 1024,  # of every GPU so far
        "regsPerMultiprocessor": facts.regs_per_multiprocessor,
        "multiProcessorCount": facts.multi_processor_count,
        "sharedMemPerBlockOptin": facts.shared_memory_per_block_optin,
    }
    options = {"function": "elman" if case.cell == "RNN" else case.cell.lower(), "backend": backend}
    options["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}.get(case.dtype, "float32")

    def forward(x: Tensor, w_ih: Tensor, r: Tensor, bias: Tensor) -> Tensor:
        product = functional.linear(x, w_ih).unflatten(2, (GATES[case.cell], 1, -1))
        return flashrnn.flashrnn(product, r, bias, **options)[0][0].squeeze(2)

    return forward


def load_flaggems(case: Case, device: torch.device, backend: str) -> Forward:
    lstm = _import("flaggems/src", "flag_gems.ops.lstm").lstm
    options = True, case.num_layers, 0.0, False, case.bidirectional, False

    def forward(x: Tensor, *weights: Tensor) -> Tensor:
        zeros = x.new_zeros(case.num_layers * (1 + case.bidirectional), case.batch, case.hidden_size)
        return lstm(x, (zeros, zeros), weights, *options)[0]

    return forward


HALF, TF32, IEEE = ("bf16", "fp16"), ("fp32-tf32",), ("fp32-ieee",)
TESTED = range(32, 1025, 16)  # what FlashRNN's tests go up to; 16 is the tile of its matrix instructions
FASTLSTM = (
    # tl.dot wants 16; the kernel for small H has room for no more features than units.
    Range("fastlstm/kernels.py", ("LSTM",), HALF + TF32, hidden=range(16, ANY_SIZE), wide_input=False),
)
FLASHRNN = (
    Range("README.md", ("LSTM",), HALF + TF32, ("inference",), (16, 32, 64), "triton_fused"),
    # In 16-bit types it does not compile with Triton 3: tl.exp refuses them.
    Range("flashrnn/flashrnn/triton_fused/lstm_bw.py", ("LSTM",), TF32, ("training",), (16, 32, 64), "triton_fused"),
    Range("flashrnn/tests/test_lstm.py", ("LSTM",), HALF + TF32, hidden=TESTED, backend="cuda_fused"),
    Range("flashrnn/tests/test_elman.py", ("RNN",), HALF + TF32, hidden=TESTED, backend="cuda_fused"),
    Range("flashrnn/tests/test_gru.py", ("GRU",), HALF + TF32, hidden=TESTED, backend="cuda"),
)
HASTE = (
    Range("frameworks/pytorch/lstm.cc", ("LSTM",), TF32 + IEEE),
    # Its products round as tensor cores do, whatever torch's switch says: lib/blas.h, enable_tensor_cores.
    Range("frameworks/pytorch/gru.cc", ("GRU",), ("fp16", *TF32)),
)
TORCHRL = (
    Range("torchrl/modules/tensordict_module/_rnn_triton.py", ("LSTM", "GRU"), TF32 + IEEE, ("inference",)),
    Range("benchmarks/bench_rnn_backward.py", ("LSTM", "GRU"), TF32 + IEEE, ("training",), range(1, 513)),
)
FLAGGEMS = (Range("src/flag_gems/ops/lstm.py", ("LSTM",), HALF + IEEE, ("inference",), stacked=True),)
PEERS = (
    Peer("fastlstm", FASTLSTM, as_torch, load_fastlstm),
    Peer("flashrnn", FLASHRNN, flashrnn_layout, load_flashrnn, needs=("einops",), batch_first=True),
    Peer("haste", HASTE, haste_layout, load_haste, built=("haste_pytorch_lib*.so", "frameworks/pytorch/_version.py")),
    Peer("torchrl", TORCHRL, as_torch, load_torchrl, batch_first=True),
    Peer("flaggems", FLAGGEMS, as_torch, load_flaggems, needs=("yaml", "sqlalchemy")),
)
NAMES = tuple(peer.name for peer in PEERS)
