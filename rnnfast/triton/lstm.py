"""The LSTM's kernels. Gate order i f g o. The KINDs are explained in common.py, the maths in docs/design/maths.md.

Shapes     gates_x, gates, grad_gates [D, rows, 4H]; c_saved [D, rows, H] float32; output, grad_output [rows, D*P];
           hx [D, B, P]; cx [D, B, H]; per direction weight_hh [4H, P], weight_hr [P, H]. P = H without projection.
Ownership  Program (x, y, z) owns units x * BLOCK_H.., batch rows y * BLOCK_B.. and direction z. The addresses that
           weight_hh is read from make the four gates of a unit neighbouring columns: a step has one product, not four.
Sync       WHOLE: none. GROUP: a barrier after every step. STEP: the end of each launch.
Saved      The activated gates and c. `gates` may be the memory of gates_x.
Limits     WHOLE holds weight_hh and weight_hr in shared memory. A projected layer has no GROUP, which would need a
           second barrier per step, and its STEP takes two launches.
"""

import triton
import triton.language as tl

from .common import (
    GROUP,
    STEP,
    WHOLE,
    first_row,
    interleave,
    product,
    row_before,
    separate,
    streamed_product,
    tanh,
    tile_of,
    wait_for_group,
)


@triton.jit(do_not_specialize=("steps", "batch", "rows", "first", "last"))
def lstm_forward(
    gates_x, weight_hh, weight_hh_reverse, weight_hr, weight_hr_reverse, hx, cx, lengths, offsets,
    output, h_n, c_n, gates, c_saved, hidden, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, SAVE: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1. BLOCK_K counts elements of h: in WHOLE and GROUP all of them.

    STEP: cx and c_n are the same float32 tensor. A projected layer leaves h in `hidden` [D, B, H] for lstm_project.
    """
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    PROJECTED: tl.constexpr = P != H
    dtype = output.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    place = (direction * batch + b)[:, None].to(tl.int64) * H + n[None, :]  # in [D, B, H]
    state = (direction * batch + b).to(tl.int64) * P  # in [D, B, P]
    c = tl.load(cx + place, mask=in_batch & (n < H)[None, :], other=0.0).to(tl.float32)

    column = tl.arange(0, 4 * BLOCK_H)  # 4 * unit + gate
    unit = tile * BLOCK_H + column // 4
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse) + ((column % 4) * H + unit).to(tl.int64) * P
    if KIND != STEP:
        held = (unit < H)[None, :] & (k < P)[:, None]
        resident = tl.load(weight[None, :] + k[:, None], mask=held, other=0.0)  # [BLOCK_K, 4 * BLOCK_H]
    if KIND == WHOLE:
        h = tl.load(hx + state[:, None] + k[None, :], mask=in_batch & (k < P)[None, :], other=0.0)
        if PROJECTED:
            projection = tl.where(direction == 0, weight_hr, weight_hr_reverse) + k[None, :] * H + n[:, None]
            projection = tl.load(projection, mask=(n < H)[:, None] & (k < P)[None, :], other=0.0)

    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, s, steps - 1 - s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        x = gates_x + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
        i = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(x + H, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(x + 2 * H, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(x + 3 * H, mask=mask, other=0.0).to(tl.float32)
        joined = tl.zeros((BLOCK_B, 4 * BLOCK_H), tl.float32)
        if KIND == WHOLE:
            joined = product(h, resident, joined, PRECISION, UPCAST)
        else:
            earlier_row = first_row(t + 2 * direction - 1, steps, batch, offsets, RAGGED) + b
            h_before = row_before(t, begin, hx + state, output + direction * P, earlier_row, D * P, P)
            if KIND == GROUP:
                inside = valid[:, None] & (k < P)[None, :]
                h = tl.load(h_before[:, None] + k[None, :], mask=inside, other=0.0, cache_modifier=".cg")
                joined = product(h, resident, joined, PRECISION, UPCAST)
            else:
                joined = streamed_product(
                    h_before, valid, weight, unit < H, joined, P, 1, BLOCK_K, STAGES, PRECISION, UPCAST
                )
        h_i, h_f, h_g, h_o = separate(joined)
        i = tl.sigmoid(i + h_i)
        f = tl.sigmoid(f + h_f)
        g = tanh(g + h_g)
        o = tl.sigmoid(o + h_o)
        c = tl.where(mask, f * c + i * g, c)
        new = (o * tanh(c)).to(dtype)
        if SAVE:
            saved = gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
            tl.store(saved, i.to(dtype), mask=mask)
            tl.store(saved + H, f.to(dtype), mask=mask)
            tl.store(saved + 2 * H, g.to(dtype), mask=mask)
            tl.store(saved + 3 * H, o.to(dtype), mask=mask)
            tl.store(c_saved + (direction * rows + row)[:, None] * H + n[None, :], c, mask=mask)
        if KIND == WHOLE:
            if PROJECTED:
                narrow = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
                new = product(new, projection, narrow, PRECISION, UPCAST).to(dtype)
            inside = valid[:, None] & (k < P)[None, :]
            h = tl.where(inside, new.to(tl.float32), h.to(tl.float32)).to(dtype)
            tl.store(output + row[:, None] * (D * P) + direction * P + k[None, :], new, mask=inside)
        elif PROJECTED:
            tl.store(hidden + place, new, mask=mask)
        else:
            tl.store(output + row[:, None] * (D * P) + direction * P + n[None, :], new, mask=mask)
            tl.store(h_n + state[:, None] + n[None, :], new, mask=mask & (t == end)[:, None])
        if KIND == GROUP:
            if s + 1 < last:
                wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)
    tl.store(c_n + place, c.to(c_n.dtype.element_ty), mask=in_batch & (n < H)[None, :])
    if KIND == WHOLE:
        tl.store(h_n + state[:, None] + k[None, :], h, mask=in_batch & (k < P)[None, :])


@triton.jit(do_not_specialize=("steps", "batch", "rows", "s"))
def lstm_project(
    hidden, weight_hr, weight_hr_reverse, lengths, offsets, output, h_n, steps, batch, rows, s,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """STEP's second launch of a projected layer: output = hidden W_hr^T at step s. A program owns BLOCK_H of the P."""
    _, direction, b, p, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    t = tl.where(direction == 0, s, steps - 1 - s)
    row = first_row(t, steps, batch, offsets, RAGGED) + b
    valid = t < length
    state = (direction * batch + b).to(tl.int64)
    weight = tl.where(direction == 0, weight_hr, weight_hr_reverse) + p.to(tl.int64) * H
    h = streamed_product(
        hidden + state * H, valid, weight, p < P, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), H, 1, BLOCK_K, STAGES,
        PRECISION, UPCAST,
    )  # fmt: skip
    h = h.to(output.dtype.element_ty)
    mask = valid[:, None] & (p < P)[None, :]
    tl.store(output + row[:, None] * (D * P) + direction * P + p[None, :], h, mask=mask)
    tl.store(h_n + state[:, None] * P + p[None, :], h, mask=mask & (t == end)[:, None])


@triton.jit(do_not_specialize=("steps", "batch", "rows", "s"))
def lstm_unproject(
    grad_output, grad_h_n, weight_hh, weight_hh_reverse, lengths, offsets, grad_gates, grad_projected,
    steps, batch, rows, s,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, GRAD_OUTPUT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """STEP's first launch of a projected layer in backward, at the s-th step from the end.

    Writes the gradient of the projected h to `grad_projected` [D, rows, P]. A program owns BLOCK_H of the P.
    """
    _, direction, b, p, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    t = tl.where(direction == 0, steps - 1 - s, s)
    row = first_row(t, steps, batch, offsets, RAGGED) + b
    valid = t < length
    mask = valid[:, None] & (p < P)[None, :]
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if GRAD_OUTPUT:
        given = grad_output + row[:, None] * (D * P) + direction * P + p[None, :]
        dh += tl.load(given, mask=mask, other=0.0).to(tl.float32)
    given = grad_h_n + (direction * batch + b)[:, None].to(tl.int64) * P + p[None, :]
    dh += tl.load(given, mask=mask & (t == end)[:, None], other=0.0).to(tl.float32)
    later_row = first_row(t + 1 - 2 * direction, steps, batch, offsets, RAGGED) + b
    later_gates = grad_gates + (direction * rows + later_row) * (4 * H)
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse) + p
    dh = streamed_product(
        later_gates, valid & (t != end), weight, p < P, dh, 4 * H, P, BLOCK_K, STAGES, PRECISION, UPCAST
    )
    out = grad_projected + (direction * rows + row)[:, None] * P + p[None, :]
    tl.store(out, dh.to(grad_projected.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("steps", "batch", "rows", "first", "last"))
def lstm_backward(
    grad_output, grad_h_n, grad_c_n, weight_hh, weight_hh_reverse, weight_hr, weight_hr_reverse, cx, gates, c_saved,
    lengths, offsets, grad_gates, grad_projected, grad_hx, grad_cx, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, GRAD_OUTPUT: tl.constexpr,
    KIND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1, counted from the end. Then the gradient of hx; in STEP only if first = steps.

    dh = grad_output + (gradients of the next step's gates) W_hh. In WHOLE, BLOCK_K counts the P columns of dh. In
    GROUP and STEP a program owns units of dh, and BLOCK_K counts the 4H rows of W_hh. In STEP, grad_c_n and grad_cx
    are the same float32 tensor, and a projected layer finds the gradient of the projected h in `grad_projected`.
    """
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    PROJECTED: tl.constexpr = P != H
    dtype = grad_gates.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    place = (direction * batch + b)[:, None].to(tl.int64) * H + n[None, :]  # in [D, B, H]
    state = (direction * batch + b).to(tl.int64) * P  # in [D, B, P]
    dc = tl.load(grad_c_n + place, mask=in_batch & (n < H)[None, :], other=0.0).to(tl.float32)

    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse)
    projection = tl.where(direction == 0, weight_hr, weight_hr_reverse)
    p = n  # the columns of dh
    if KIND == WHOLE:
        p = k
        column = tl.arange(0, 4 * BLOCK_H)  # 4 * unit + gate
        weight += ((column % 4) * H + column // 4)[:, None] * P + p[None, :]
        resident = tl.load(weight, mask=(column // 4 < H)[:, None] & (p < P)[None, :], other=0.0)
        later = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)  # what the step after adds to dh
        if PROJECTED:
            held = (p < P)[:, None] & (n < H)[None, :]
            projection = tl.load(projection + p[:, None] * H + n[None, :], mask=held, other=0.0)
    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, steps - 1 - s, s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        saved = gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
        i = tl.load(saved, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(saved + H, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(saved + 2 * H, mask=mask, other=0.0).to(tl.float32)
        o = tl.load(saved + 3 * H, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(c_saved + (direction * rows + row)[:, None] * H + n[None, :], mask=mask, other=0.0)
        earlier_row = first_row(t + 2 * direction - 1, steps, batch, offsets, RAGGED) + b
        earlier_c = c_saved + (direction * rows + earlier_row)[:, None] * H + n[None, :]
        c_before = tl.load(earlier_c, mask=mask & (t != begin)[:, None], other=0.0)
        c_before += tl.load(cx + place, mask=mask & (t == begin)[:, None], other=0.0).to(tl.float32)

        later_row = first_row(t + 1 - 2 * direction, steps, batch, offsets, RAGGED) + b
        later_gates = grad_gates + (direction * rows + later_row) * (4 * H)
        dh = tl.zeros((BLOCK_B, BLOCK_K if KIND == WHOLE else BLOCK_H), tl.float32)
        if KIND == STEP and PROJECTED:
            dh = streamed_product(
                grad_projected + (direction * rows + row) * P, valid, projection + n, n < H, dh, P, H, BLOCK_K, STAGES,
                PRECISION, UPCAST,
            )  # fmt: skip
        else:
            inside = valid[:, None] & (p < P)[None, :]
            if GRAD_OUTPUT:
                given = grad_output + row[:, None] * (D * P) + direction * P + p[None, :]
                dh += tl.load(given, mask=inside, other=0.0).to(tl.float32)
            ending = inside & (t == end)[:, None]
            dh += tl.load(grad_h_n + state[:, None] + p[None, :], mask=ending, other=0.0).to(tl.float32)
            if KIND == WHOLE:
                dh += later
            else:
                dh = streamed_product(
                    later_gates, valid & (t != end), weight + n, n < P, dh, 4 * H, P, BLOCK_K, STAGES, PRECISION, UPCAST
                )
        if KIND == WHOLE and PROJECTED:
            low = dh.to(dtype)
            tl.store(grad_projected + (direction * rows + row)[:, None] * P + p[None, :], low, mask=inside)
            dh = product(low, projection, tl.zeros((BLOCK_B, BLOCK_H), tl.float32), PRECISION, UPCAST)

        tanh_c = tanh(c)
        full = dc + dh * o * (1.0 - tanh_c * tanh_c)
        d_i = (full * g * i * (1.0 - i)).to(dtype)
        d_f = (full * c_before * f * (1.0 - f)).to(dtype)
        d_g = (full * i * (1.0 - g * g)).to(dtype)
        d_o = (dh * tanh_c * o * (1.0 - o)).to(dtype)
        dc = tl.where(mask, full * f, dc)
        out = grad_gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
        tl.store(out, d_i, mask=mask)
        tl.store(out + H, d_f, mask=mask)
        tl.store(out + 2 * H, d_g, mask=mask)
        tl.store(out + 3 * H, d_o, mask=mask)
        if KIND == WHOLE:
            new = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
            new = product(interleave(d_i, d_f, d_g, d_o), resident, new, PRECISION, UPCAST)
            later = tl.where(valid[:, None], new, later)
        if KIND == GROUP:
            wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)
    tl.store(grad_cx + place, dc.to(grad_cx.dtype.element_ty), mask=in_batch & (n < H)[None, :])

    if (first == steps) | (KIND != STEP):
        inside = in_batch & (p < P)[None, :]
        none = inside & (length == 0)[:, None]  # these rows' h_n is their hx
        dh = tl.load(grad_h_n + state[:, None] + p[None, :], mask=none, other=0.0).to(tl.float32)
        if KIND == WHOLE:
            dh += later
        else:
            later_row = first_row(begin, steps, batch, offsets, RAGGED) + b
            later_gates = grad_gates + (direction * rows + later_row) * (4 * H)
            dh = streamed_product(
                later_gates, length > 0, weight + n, n < P, dh, 4 * H, P, BLOCK_K, STAGES, PRECISION, UPCAST
            )
        tl.store(grad_hx + state[:, None] + p[None, :], dh.to(grad_hx.dtype.element_ty), mask=inside)
