"""Shared parts of the three cells' kernels: places of rows, products, activations, and the barrier between programs.

Each kernel walks the steps of a tile of BLOCK_B batch rows in one direction. It has three KINDs, which differ in who
holds h and the recurrent weights:

    WHOLE  One program owns all units. It loads the weights once, and h stays on the chip for the whole sequence.
    GROUP  The programs of a batch tile own BLOCK_H units each. Forward holds its slice of the weights. Backward's
           product, with few columns and 4H rows, would not fit into registers, so backward streams the weights from
           L2 in blocks of BLOCK_K. h goes through `output` and the gates' gradients through `grad_gates`, with a
           barrier after every step. All programs must run at the same time: a cooperative launch guarantees it.
    STEP   As GROUP, but one launch does one step, and forward streams the weights too.

Rows: step t of batch row b lies at t * batch + b, or with batch_sizes at offsets[t] + b. Direction 1 walks each row
from the row's last step to step 0. No kernel touches a row at or after its length.
"""

import triton
import triton.language as tl

WHOLE = tl.constexpr(0)
GROUP = tl.constexpr(1)
STEP = tl.constexpr(2)

PADDED = tl.constexpr(0)  # RAGGED: every row has all steps
LENGTHS = tl.constexpr(1)  # padded rows with lengths
PACKED = tl.constexpr(2)  # the rows of a PackedSequence


@triton.jit
def row_lengths(lengths, b, steps, batch, RAGGED: tl.constexpr):
    """int32 [BLOCK_B]; 0 for rows beyond the batch, so that t < length tells whether a row has step t."""
    if RAGGED == PADDED:
        return tl.where(b < batch, steps, 0)
    length = tl.load(lengths + b, mask=b < batch, other=0).to(tl.int32)
    return tl.minimum(tl.maximum(length, 0), steps)


@triton.jit
def row_ends(length, direction):
    """int32 [BLOCK_B] each: a row's first step and its last, in the order of this direction."""
    return tl.where(direction == 0, 0, length - 1), tl.where(direction == 0, length - 1, 0)


@triton.jit
def tile_of(lengths, steps, batch, RAGGED: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """What program (x, y, z) owns: x, direction z, batch rows b and units n, and the rows' lengths and ends.

    b, the lengths and the ends are int32 [BLOCK_B], n is int32 [BLOCK_H].
    """
    tile, direction = tl.program_id(0), tl.program_id(2)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    length = row_lengths(lengths, b, steps, batch, RAGGED)
    begin, end = row_ends(length, direction)
    return tile, direction, b, n, length, begin, end


@triton.jit
def first_row(t, steps, batch, offsets, RAGGED: tl.constexpr):
    """int64: the first row of step t. A t outside 0..steps-1 is moved into that range; nobody uses its rows."""
    t = tl.minimum(tl.maximum(t, 0), steps - 1)
    if RAGGED == PACKED:
        return tl.load(offsets + t)
    return t.to(tl.int64) * batch


@triton.jit
def row_before(t, begin, hx_rows, output, rows_before, WIDTH: tl.constexpr, P: tl.constexpr):
    """Pointers [BLOCK_B] to the h [P] that step t starts from: hx at a row's first step, else the step before.

    Both tensors are aligned (layers.aligned), but the compiler cannot see that through the choice between them.
    """
    pointers = tl.where(t == begin, hx_rows, output + rows_before * WIDTH)
    if P % 8 == 0:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """accumulator + a @ b in float32. UPCAST: for the interpreter, which has no products of bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def streamed_product(
    a, a_mask, b, b_mask, accumulator, K: tl.constexpr, B_STRIDE: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """accumulator + A @ B in blocks of BLOCK_K. Row m of A is at a[m]; column n of B is at b[n], B_STRIDE apart.

    Other programs may have written A one step ago. `.cg` reads from L2, but only whole pieces of 16 bytes. With an odd
    H, the acquire in wait_for_group is what empties this processor's L1.
    """
    k = tl.arange(0, BLOCK_K)
    for block in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = block + k < K
        reached = a_mask[:, None] & inside[None, :]
        rows = tl.load(a[:, None] + (block + k)[None, :], mask=reached, other=0.0, cache_modifier=".cg")
        places = (block + k).to(tl.int64) * B_STRIDE
        columns = tl.load(b[None, :] + places[:, None], mask=b_mask[None, :] & inside[:, None], other=0.0)
        accumulator = product(rows, columns, accumulator, PRECISION, UPCAST)
    return accumulator


@triton.jit
def tanh(x):
    """float32; within 2e-7 of tanh, absolutely and relatively. The odd polynomial gives the relative bound near 0."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    series = 62.0 / 2835 * square - 17.0 / 315
    series = (series * square + 2.0 / 15) * square - 1.0 / 3
    small = x + x * square * series
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0, -large, large))


@triton.jit
def interleave(first, second, third, fourth):
    """Four [B, N] as one [B, 4N]: column 4n + g is column n of the g-th."""
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, (first.shape[0], 4 * first.shape[1]))


@triton.jit
def separate(joined):
    """The inverse of `interleave`."""
    even, odd = tl.split(tl.reshape(joined, (joined.shape[0], joined.shape[1] // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def wait_for_group(arrivals, step):
    """Returns when all programs of this batch tile and direction have finished `step` and their stores are visible.

    The acquire is inside the loop, because Triton 3.6 drops an acquire whose result nobody reads.
    """
    tl.debug_barrier()  # all stores of this program before the release
    tl.atomic_add(arrivals, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < (step + 1) * tl.num_programs(0):
        pass
    tl.debug_barrier()
