"""A layer whose recurrence a kernel of csrc/cuda computes in the emulator; torch does the products before and after.

`Kernels` calls the C entry points of one tier (tests/emulator/run_*.h); `forward()` has the form of harness.run.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from support.harness import Case

Tensor = torch.Tensor

PRODUCTS = {"bf16": 0, "f16": 1, "tf32": 2, "exact": 3}  # enum class Arithmetic
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "exact": torch.float32}
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
CELLS = {"rnn_tanh": 0, "rnn_relu": 0, "gru": 1, "lstm": 2}  # enum class Cell
GUARD = 32  # elements around every tensor that a kernel gets, which it must leave alone


class Kernels:
    """One tier's kernels. `misaligned`: tensors start at an odd element."""

    def __init__(self, library: str, tier: str):
        self.library = ctypes.CDLL(library)
        self.entries = {}
        for name in ("forward", "backward"):
            entry = getattr(self.library, f"rnnfast_{tier}_{name}")
            entry.restype = ctypes.c_char_p
            self.entries[name] = entry
        self.set_seed = getattr(self.library, f"rnnfast_{tier}_seed")
        self.set_seed.argtypes = [ctypes.c_uint64]

    def call(self, name: str, product: str, sizes: list[int], tensors: list[Tensor | None]) -> None:
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        error = self.entries[name](
            PRODUCTS[product],
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(addresses))(*addresses),
        )
        assert error is None, f"{name}: {error.decode()}"


class Memory:
    """Tensors between guards, all at one offset from an aligned address."""

    def __init__(self, misaligned: bool):
        self.shift = GUARD + misaligned
        self.buffers: list[tuple[Tensor, int]] = []

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
        self.buffers.append((buffer, size))
        return buffer[self.shift : self.shift + size].view(shape)

    def copy(self, source: Tensor | None) -> Tensor | None:
        return None if source is None else self.new(*source.shape, dtype=source.dtype).copy_(source)

    def check(self) -> None:
        for buffer, size in self.buffers:
            assert buffer[: self.shift].isnan().all() and buffer[self.shift + size :].isnan().all(), "a guard was hit"


@dataclass
class Rows:
    """Where a layer's rows lie; see csrc/cuda/layer.h. `index` [T, B]: a row's number, -1 where there is none."""

    steps: int
    batch: int
    count: int
    offsets: Tensor | None
    lengths: Tensor | None
    index: Tensor

    @staticmethod
    def of(steps: int, batch: int, lengths: Tensor | None, packed: bool) -> Rows:
        all_lengths = torch.full((batch,), steps) if lengths is None else lengths
        active = torch.arange(steps)[:, None] < all_lengths
        if packed:
            count = int(active.sum())
            index = torch.full((steps, batch), -1).masked_scatter(active, torch.arange(count))
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)[:-1]])
        else:
            count, offsets = steps * batch, None
            index = torch.where(active, torch.arange(count).view(steps, batch), -1)
        return Rows(steps, batch, count, offsets, None if lengths is None else lengths.int(), index)

    def previous(self, values: Tensor, initial: Tensor, direction: int) -> Tensor:
        """`values` [N, size] of each row's previous step, or `initial` [B, size] at a sequence's first."""
        result = torch.zeros_like(values)
        for t in range(self.steps):
            before = t + 1 if direction else t - 1
            for b in range(self.batch):
                row = int(self.index[t, b])
                if row >= 0:
                    known = 0 <= before < self.steps and self.index[before, b] >= 0
                    result[row] = values[self.index[before, b]] if known else initial[b]
        return result


class Recurrence(torch.autograd.Function):
    """output [N, D*P], h_n, c_n of x [N, I], hx, cx; `weights` in torch's order, direction by direction."""

    @staticmethod
    def forward(ctx, layer: Layer, training: bool, x, hx, cx, *weights):
        ctx.set_materialize_grads(False)  # a missing gradient is a null pointer
        memory, rows, dtype = Memory(layer.misaligned), layer.rows, x.dtype
        directions = [layer.named(weights, d) for d in range(layer.directions)]
        H, P, D, N, B = layer.H, layer.P, layer.directions, rows.count, rows.batch
        gates_x = memory.new(D, N, layer.gates * H, dtype=dtype)
        for d, w in enumerate(directions):
            bias = w["bias_ih"].float() + w["bias_hh"].float()
            if layer.cell == "gru":
                bias = torch.cat([bias[: 2 * H], w["bias_ih"][2 * H :].float()])
            gates_x[d] = (x.float() @ w["weight_ih"].float().t() + bias).to(dtype)
        lstm, saves = layer.cell == "lstm", training and layer.gates > 1
        output = memory.new(N, D * P, dtype=dtype)
        h_n, c_n = memory.new(D, B, P, dtype=dtype), memory.new(D, B, H, dtype=dtype) if lstm else None
        in_place = saves and lstm and layer.in_place
        gates = gates_x if in_place else memory.new(D, N, 4 * H, dtype=dtype) if saves else None
        c = memory.new(D, N, H, dtype=torch.float32) if saves and lstm else None
        states = [memory.copy(hx), memory.copy(cx)]
        kernel_weights = layer.kernel_weights(memory, directions)
        tensors = [*kernel_weights, *states, gates_x, output, h_n, c_n, gates, c]
        layer.call("forward", tensors, memory)
        ctx.layer, ctx.directions, ctx.x, ctx.states = layer, directions, x, (hx, cx)
        ctx.results = output, gates, c
        return (output.clone(), h_n.clone(), c_n.clone() if lstm else None)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        layer, x, (hx, cx), (output, gates, c) = ctx.layer, ctx.x, ctx.states, ctx.results
        memory, rows, dtype = Memory(layer.misaligned), layer.rows, x.dtype
        H, P, D, N, B = layer.H, layer.P, layer.directions, rows.count, rows.batch
        lstm, projected = layer.cell == "lstm", layer.P < layer.H
        planes = 1 if layer.gates == 1 else 4
        grad_gates = memory.new(D, N, planes * H, dtype=dtype)
        grad_projected = memory.new(D, N, P, dtype=dtype) if projected else None
        grad_hx, grad_cx = memory.new(D, B, P, dtype=dtype), memory.new(D, B, H, dtype=dtype) if lstm else None
        given = [memory.copy(t) for t in (hx, cx, output, gates)]
        grads = [memory.copy(g) for g in (grad_output, grad_h_n, grad_c_n)]
        tensors = [*layer.kernel_weights(memory, ctx.directions), *given, memory.copy(c), *grads]
        layer.call("backward", [*tensors, grad_gates, grad_projected, grad_hx, grad_cx], memory)
        grad_x, grad_weights = torch.zeros(x.shape), []
        for d, w in enumerate(ctx.directions):
            of_x = of_h = grad_gates[d].float()
            if layer.cell == "gru":
                n_x, r, z, n_h = of_x.split(H, 1)
                of_x, of_h = torch.cat([r, z, n_x], 1), torch.cat([r, z, n_h], 1)
            h_own = output[:, d * P : (d + 1) * P].float()
            initial = torch.zeros(B, P) if hx is None else hx[d].float()
            grad_x += of_x @ w["weight_ih"].float()
            parts = [of_x.t() @ x.float(), of_h.t() @ rows.previous(h_own, initial, d), of_x.sum(0), of_h.sum(0)]
            if projected:
                hidden = gates[d].float()[:, 3 * H :] * c[d].tanh()
                exists = torch.zeros(N, 1).index_fill_(0, rows.index[rows.index >= 0], 1)
                parts.append(grad_projected[d].float().t() @ torch.where(exists > 0, hidden, 0))
            grad_weights += [part.to(dtype) for part in parts]
        states = (None if hx is None else grad_hx.clone(), None if cx is None else grad_cx.clone())
        return None, None, grad_x.to(dtype), *states, *grad_weights


@dataclass
class Layer:
    kernels: Kernels
    product: str
    cell: str
    H: int
    P: int
    directions: int
    rows: Rows
    misaligned: bool
    in_place: bool

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    def named(self, weights, direction: int) -> dict[str, Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")[: 4 + (self.P < self.H)]
        return dict(zip(names, weights[direction * len(names) :], strict=False))

    def kernel_weights(self, memory: Memory, directions) -> list[Tensor | None]:
        result = []
        for w in directions:
            bias_hn = w["bias_hh"][2 * self.H :] if self.cell == "gru" else None
            result += [memory.copy(w["weight_hh"]), memory.copy(w.get("weight_hr")), memory.copy(bias_hn)]
        return (result + [None] * 3)[:6]

    def call(self, name: str, tensors, memory: Memory) -> None:
        rows = self.rows
        relu = self.cell == "rnn_relu"
        sizes = [CELLS[self.cell], relu, self.H, self.P, rows.steps, rows.batch, self.directions, rows.count]
        self.kernels.call(name, self.product, sizes, [rows.offsets, rows.lengths, *tensors])
        memory.check()


def forward(kernels: Kernels, product: str, case: Case, lengths: Tensor | None, parameters, **options):
    """For harness.run: output, h_n, c_n of a one-layer case, whose packed sequences are sorted as torch does it."""
    packed = case.ragged in ("sorted", "unsorted")
    order = lengths.argsort(descending=True, stable=True) if packed else torch.arange(case.B)
    back = order.argsort()
    rows = Rows.of(case.T, case.B, lengths[order] if lengths is not None else None, packed)
    layer = Layer(kernels, product, case.cell, case.H, case.proj or case.H, case.directions, rows, **options)
    kept = rows.index >= 0 if packed else torch.ones(case.T, case.B, dtype=torch.bool)

    def run(x, hx):
        h, c = hx if case.cell == "lstm" and hx is not None else (hx, None)
        h, c = (None if state is None else state[:, order] for state in (h, c))
        training = torch.is_grad_enabled()
        flat, h_n, c_n = Recurrence.apply(layer, training, x[:, order][kept], h, c, *parameters.values())
        output = flat.new_zeros(case.T, case.B, flat.shape[1]).masked_scatter(kept[:, :, None], flat)
        return output[:, back], h_n[:, back], None if c_n is None else c_n[:, back]

    return run
