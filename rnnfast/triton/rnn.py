"""The RNN's kernels, tanh or relu. The KINDs are explained in common.py, the maths in docs/design/maths.md.

Shapes     gates_x, grad_gates [D, rows, H]; output, grad_output [rows, D*H]; hx [D, B, H]; per direction
           weight_hh [H, H].
Ownership  Program (x, y, z) owns units x * BLOCK_H.., batch rows y * BLOCK_B.. and direction z.
Sync       WHOLE: none. GROUP: a barrier after every step. STEP: the end of each launch.
Saved      Nothing: both derivatives follow from `output`.
Limits     WHOLE and GROUP hold weight_hh in shared memory.
"""

import triton
import triton.language as tl

from .common import (
    GROUP,
    STEP,
    WHOLE,
    first_row,
    product,
    row_before,
    streamed_product,
    tanh,
    tile_of,
    wait_for_group,
)


@triton.jit(do_not_specialize=("steps", "batch", "rows", "first", "last"))
def rnn_forward(
    gates_x, weight_hh, weight_hh_reverse, hx, lengths, offsets,
    output, h_n, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, D: tl.constexpr, RELU: tl.constexpr, RAGGED: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1. BLOCK_K counts elements of h: in WHOLE and GROUP all of them."""
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    dtype = output.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    state = (direction * batch + b).to(tl.int64) * H  # in [D, B, H]
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse) + n.to(tl.int64) * H
    if KIND != STEP:
        held = (n < H)[None, :] & (k < H)[:, None]
        resident = tl.load(weight[None, :] + k[:, None], mask=held, other=0.0)  # [BLOCK_K, BLOCK_H]
    if KIND == WHOLE:
        h = tl.load(hx + state[:, None] + k[None, :], mask=in_batch & (k < H)[None, :], other=0.0)

    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, s, steps - 1 - s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        x = gates_x + (direction * rows + row)[:, None] * H + n[None, :]
        a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        if KIND == WHOLE:
            a = product(h, resident, a, PRECISION, UPCAST)
        else:
            earlier_row = first_row(t + 2 * direction - 1, steps, batch, offsets, RAGGED) + b
            h_before = row_before(t, begin, hx + state, output + direction * H, earlier_row, D * H, H)
            if KIND == GROUP:
                inside = valid[:, None] & (k < H)[None, :]
                h = tl.load(h_before[:, None] + k[None, :], mask=inside, other=0.0, cache_modifier=".cg")
                a = product(h, resident, a, PRECISION, UPCAST)
            else:
                a = streamed_product(h_before, valid, weight, n < H, a, H, 1, BLOCK_K, STAGES, PRECISION, UPCAST)
        if RELU:
            a = tl.maximum(a, 0.0, propagate_nan=tl.PropagateNan.ALL)
        else:
            a = tanh(a)
        new = a.to(dtype)
        tl.store(output + row[:, None] * (D * H) + direction * H + n[None, :], new, mask=mask)
        if KIND == WHOLE:
            h = tl.where(mask, new.to(tl.float32), h.to(tl.float32)).to(dtype)
        else:
            tl.store(h_n + state[:, None] + n[None, :], new, mask=mask & (t == end)[:, None])
        if KIND == GROUP:
            if s + 1 < last:
                wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)
    if KIND == WHOLE:
        tl.store(h_n + state[:, None] + n[None, :], h, mask=in_batch & (n < H)[None, :])


@triton.jit(do_not_specialize=("steps", "batch", "rows", "first", "last"))
def rnn_backward(
    grad_output, grad_h_n, weight_hh, weight_hh_reverse, output, lengths, offsets,
    grad_gates, grad_hx, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, D: tl.constexpr, RELU: tl.constexpr, RAGGED: tl.constexpr, GRAD_OUTPUT: tl.constexpr,
    KIND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1, counted from the end. Then the gradient of hx; in STEP only if first = steps.

    dh = grad_output + (the next step's gradient) W_hh. BLOCK_K counts rows of W_hh: in WHOLE all of them.
    """
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    dtype = grad_gates.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    state = (direction * batch + b).to(tl.int64) * H  # in [D, B, H]
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse)
    if KIND == WHOLE:
        held = (k < H)[:, None] & (n < H)[None, :]
        resident = tl.load(weight + k[:, None].to(tl.int64) * H + n[None, :], mask=held, other=0.0)
        later = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)  # what the step after adds to dh

    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, steps - 1 - s, s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        out = row[:, None] * (D * H) + direction * H + n[None, :]
        h = tl.load(output + out, mask=mask, other=0.0).to(tl.float32)
        dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if GRAD_OUTPUT:
            dh += tl.load(grad_output + out, mask=mask, other=0.0).to(tl.float32)
        ending = mask & (t == end)[:, None]
        dh += tl.load(grad_h_n + state[:, None] + n[None, :], mask=ending, other=0.0).to(tl.float32)
        if KIND == WHOLE:
            dh += later
        else:
            later_row = first_row(t + 1 - 2 * direction, steps, batch, offsets, RAGGED) + b
            later_gates = grad_gates + (direction * rows + later_row) * H
            dh = streamed_product(
                later_gates, valid & (t != end), weight + n, n < H, dh, H, H, BLOCK_K, STAGES, PRECISION, UPCAST
            )
        if RELU:
            new = tl.where(h <= 0.0, 0.0, dh).to(dtype)
        else:
            new = (dh * (1.0 - h * h)).to(dtype)
        tl.store(grad_gates + (direction * rows + row)[:, None] * H + n[None, :], new, mask=mask)
        if KIND == WHOLE:
            passed_on = product(new, resident, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), PRECISION, UPCAST)
            later = tl.where(valid[:, None], passed_on, later)
        if KIND == GROUP:
            wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)

    if (first == steps) | (KIND != STEP):
        inside = in_batch & (n < H)[None, :]
        none = inside & (length == 0)[:, None]  # these rows' h_n is their hx
        dh = tl.load(grad_h_n + state[:, None] + n[None, :], mask=none, other=0.0).to(tl.float32)
        if KIND == WHOLE:
            dh += later
        else:
            later_row = first_row(begin, steps, batch, offsets, RAGGED) + b
            later_gates = grad_gates + (direction * rows + later_row) * H
            dh = streamed_product(
                later_gates, length > 0, weight + n, n < H, dh, H, H, BLOCK_K, STAGES, PRECISION, UPCAST
            )
        tl.store(grad_hx + state[:, None] + n[None, :], dh.to(grad_hx.dtype.element_ty), mask=inside)
