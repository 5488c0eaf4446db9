"""The GRU's kernels. Gate order r z n. The KINDs are explained in common.py, the maths in docs/design/maths.md.

Shapes     gates_x [D, rows, 3H]; gates [D, rows, 4H]: r z n and W_hn h + b_hn; grad_gates [D, rows, 4H]: n_x r z n_h,
           where the first three multiply x and the last three h; output, grad_output [rows, D*H]; hx [D, B, H]; per
           direction weight_hh [3H, H], bias_hn [H].
Ownership  Program (x, y, z) owns units x * BLOCK_H.., batch rows y * BLOCK_B.. and direction z. The addresses that
           weight_hh is read from make r and z of a unit neighbouring columns of one product. n has a product of its
           own: a fourth column of zeros would cost a third more shared memory.
Sync       WHOLE: none. GROUP: a barrier after every step. STEP: the end of each launch.
Saved      r z n and W_hn h + b_hn. h is rounded to the tensors' dtype after every step, as it stands in `output`.
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
def gru_forward(
    gates_x, weight_hh, weight_hh_reverse, bias_hn, bias_hn_reverse, hx, lengths, offsets,
    output, h_n, gates, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, SAVE: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1. BLOCK_K counts elements of h: in WHOLE and GROUP all of them."""
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    dtype = output.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    state = (direction * batch + b).to(tl.int64) * H  # in [D, B, H]
    bias = tl.load(tl.where(direction == 0, bias_hn, bias_hn_reverse) + n, mask=n < H, other=0.0).to(tl.float32)

    column = tl.arange(0, 2 * BLOCK_H)  # 2 * unit + (r or z)
    unit = tile * BLOCK_H + column // 2
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse)
    weight_n = weight + (2 * H + n).to(tl.int64) * H
    weight_rz = weight + ((column % 2) * H + unit).to(tl.int64) * H
    if KIND != STEP:
        held = (unit < H)[None, :] & (k < H)[:, None]
        resident_rz = tl.load(weight_rz[None, :] + k[:, None], mask=held, other=0.0)  # [BLOCK_K, 2 * BLOCK_H]
        held = (n < H)[None, :] & (k < H)[:, None]
        resident_n = tl.load(weight_n[None, :] + k[:, None], mask=held, other=0.0)
    if KIND == WHOLE:
        h = tl.load(hx + state[:, None] + k[None, :], mask=in_batch & (k < H)[None, :], other=0.0)

    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, s, steps - 1 - s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        x = gates_x + (direction * rows + row)[:, None] * (3 * H) + n[None, :]
        r = tl.load(x, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(x + H, mask=mask, other=0.0).to(tl.float32)
        x_n = tl.load(x + 2 * H, mask=mask, other=0.0).to(tl.float32)
        joined = tl.zeros((BLOCK_B, 2 * BLOCK_H), tl.float32)
        n_of_h = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if KIND == WHOLE:
            own_h = h.to(tl.float32)
            joined = product(h, resident_rz, joined, PRECISION, UPCAST)
            n_of_h = product(h, resident_n, n_of_h, PRECISION, UPCAST)
        else:
            earlier_row = first_row(t + 2 * direction - 1, steps, batch, offsets, RAGGED) + b
            h_before = row_before(t, begin, hx + state, output + direction * H, earlier_row, D * H, H)
            own_h = tl.load(h_before[:, None] + n[None, :], mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            if KIND == GROUP:
                inside = valid[:, None] & (k < H)[None, :]
                h = tl.load(h_before[:, None] + k[None, :], mask=inside, other=0.0, cache_modifier=".cg")
                joined = product(h, resident_rz, joined, PRECISION, UPCAST)
                n_of_h = product(h, resident_n, n_of_h, PRECISION, UPCAST)
            else:
                for block in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                    inside = block + k < H
                    h = tl.load(
                        h_before[:, None] + (block + k)[None, :], mask=valid[:, None] & inside[None, :], other=0.0
                    )
                    w = tl.load(
                        weight_rz[None, :] + (block + k)[:, None], mask=(unit < H)[None, :] & inside[:, None], other=0.0
                    )
                    joined = product(h, w, joined, PRECISION, UPCAST)
                    w = tl.load(
                        weight_n[None, :] + (block + k)[:, None], mask=(n < H)[None, :] & inside[:, None], other=0.0
                    )
                    n_of_h = product(h, w, n_of_h, PRECISION, UPCAST)
        h_r, h_z = tl.split(tl.reshape(joined, (BLOCK_B, BLOCK_H, 2)))
        n_of_h += bias[None, :]
        r = tl.sigmoid(r + h_r)
        z = tl.sigmoid(z + h_z)
        candidate = tanh(x_n + r * n_of_h)
        new = (candidate + z * (own_h - candidate)).to(dtype)
        if SAVE:
            saved = gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
            tl.store(saved, r.to(dtype), mask=mask)
            tl.store(saved + H, z.to(dtype), mask=mask)
            tl.store(saved + 2 * H, candidate.to(dtype), mask=mask)
            tl.store(saved + 3 * H, n_of_h.to(dtype), mask=mask)
        tl.store(output + row[:, None] * (D * H) + direction * H + n[None, :], new, mask=mask)
        if KIND == WHOLE:
            h = tl.where(mask, new.to(tl.float32), own_h).to(dtype)
        else:
            tl.store(h_n + state[:, None] + n[None, :], new, mask=mask & (t == end)[:, None])
        if KIND == GROUP:
            if s + 1 < last:
                wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)
    if KIND == WHOLE:
        tl.store(h_n + state[:, None] + n[None, :], h, mask=in_batch & (n < H)[None, :])


@triton.jit(do_not_specialize=("steps", "batch", "rows", "first", "last"))
def gru_backward(
    grad_output, grad_h_n, carry_state, weight_hh, weight_hh_reverse, hx, output, gates, lengths, offsets,
    grad_gates, grad_hx, arrivals,
    steps, batch, rows, first, last,
    H: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, GRAD_OUTPUT: tl.constexpr, KIND: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Steps first..last-1, counted from the end. Then the gradient of hx; in STEP only if first = steps.

    dh = grad_output + carry + (the next step's r z n_h gradients) W_hh, where carry = z dh of the next step. In WHOLE,
    BLOCK_K = BLOCK_H counts the columns of dh, and carry includes the product. In GROUP and STEP a program owns units
    of dh, and BLOCK_K counts the 3H rows of W_hh. In STEP, carry_state is float32 [D, B, H] and starts at zero.
    """
    tile, direction, b, n, length, begin, end = tile_of(lengths, steps, batch, RAGGED, BLOCK_B, BLOCK_H)
    dtype = grad_gates.dtype.element_ty
    k = tl.arange(0, BLOCK_K)
    in_batch = (b < batch)[:, None]
    state = (direction * batch + b).to(tl.int64) * H  # in [D, B, H]
    weight = tl.where(direction == 0, weight_hh, weight_hh_reverse)
    carry = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if KIND == WHOLE:
        column = tl.arange(0, 2 * BLOCK_H)  # 2 * unit + (r or z)
        rows_rz = ((column % 2) * H + column // 2)[:, None] * H + n[None, :]
        resident_rz = tl.load(weight + rows_rz, mask=(column // 2 < H)[:, None] & (n < H)[None, :], other=0.0)
        rows_n = (2 * H + k)[:, None] * H + n[None, :]
        resident_n = tl.load(weight + rows_n, mask=(k < H)[:, None] & (n < H)[None, :], other=0.0)
    if KIND == STEP:
        carry = tl.load(carry_state + state[:, None] + n[None, :], mask=in_batch & (n < H)[None, :], other=0.0)

    for s in tl.range(first, last, num_stages=STAGES if KIND == WHOLE else 1):
        t = tl.where(direction == 0, steps - 1 - s, s)
        row = first_row(t, steps, batch, offsets, RAGGED) + b
        valid = t < length
        mask = valid[:, None] & (n < H)[None, :]
        saved = gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
        r = tl.load(saved, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(saved + H, mask=mask, other=0.0).to(tl.float32)
        candidate = tl.load(saved + 2 * H, mask=mask, other=0.0).to(tl.float32)
        n_of_h = tl.load(saved + 3 * H, mask=mask, other=0.0).to(tl.float32)
        earlier_row = first_row(t + 2 * direction - 1, steps, batch, offsets, RAGGED) + b
        earlier_h = output + earlier_row[:, None] * (D * H) + direction * H + n[None, :]
        own_h = tl.load(earlier_h, mask=mask & (t != begin)[:, None], other=0.0).to(tl.float32)
        own_h += tl.load(hx + state[:, None] + n[None, :], mask=mask & (t == begin)[:, None], other=0.0).to(tl.float32)

        dh = carry
        if GRAD_OUTPUT:
            given = grad_output + row[:, None] * (D * H) + direction * H + n[None, :]
            dh += tl.load(given, mask=mask, other=0.0).to(tl.float32)
        ending = mask & (t == end)[:, None]
        dh += tl.load(grad_h_n + state[:, None] + n[None, :], mask=ending, other=0.0).to(tl.float32)
        if KIND != WHOLE:
            later_row = first_row(t + 1 - 2 * direction, steps, batch, offsets, RAGGED) + b
            later_gates = grad_gates + (direction * rows + later_row) * (4 * H) + H
            dh = streamed_product(
                later_gates, valid & (t != end), weight + n, n < H, dh, 3 * H, H, BLOCK_K, STAGES, PRECISION, UPCAST
            )

        d_n = dh * (1.0 - z) * (1.0 - candidate * candidate)
        d_r = (d_n * n_of_h * r * (1.0 - r)).to(dtype)
        d_z = (dh * (own_h - candidate) * z * (1.0 - z)).to(dtype)
        d_nh = (d_n * r).to(dtype)
        new = dh * z
        if KIND == WHOLE:
            d_rz = tl.reshape(tl.join(d_r, d_z), (BLOCK_B, 2 * BLOCK_H))
            new = product(d_rz, resident_rz, new, PRECISION, UPCAST)
            new = product(d_nh, resident_n, new, PRECISION, UPCAST)
        carry = tl.where(mask, new, carry)
        out = grad_gates + (direction * rows + row)[:, None] * (4 * H) + n[None, :]
        tl.store(out, d_n.to(dtype), mask=mask)
        tl.store(out + H, d_r, mask=mask)
        tl.store(out + 2 * H, d_z, mask=mask)
        tl.store(out + 3 * H, d_nh, mask=mask)
        if KIND == GROUP:
            wait_for_group(arrivals + direction * tl.num_programs(1) + tl.program_id(1), s)
    if KIND == STEP:
        tl.store(carry_state + state[:, None] + n[None, :], carry, mask=in_batch & (n < H)[None, :])

    if (first == steps) | (KIND != STEP):
        inside = in_batch & (n < H)[None, :]
        none = inside & (length == 0)[:, None]  # these rows' h_n is their hx
        dh = carry + tl.load(grad_h_n + state[:, None] + n[None, :], mask=none, other=0.0).to(tl.float32)
        if KIND != WHOLE:
            later_row = first_row(begin, steps, batch, offsets, RAGGED) + b
            later_gates = grad_gates + (direction * rows + later_row) * (4 * H) + H
            dh = streamed_product(
                later_gates, length > 0, weight + n, n < H, dh, 3 * H, H, BLOCK_K, STAGES, PRECISION, UPCAST
            )
        tl.store(grad_hx + state[:, None] + n[None, :], dh.to(grad_hx.dtype.element_ty), mask=inside)
