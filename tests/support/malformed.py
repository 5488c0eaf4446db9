"""How arguments are made wrong (or merely unusual), and what the documentation allows; see malformed_child.py."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64)
GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
SIZES = (1, 2, 3, 4, 5, 9, 16, 17)


class Mine(Tensor):
    """A subclass that adds nothing."""


# ------------------------------------------------ one tensor: (r, tensor) -> what takes its place


def of_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape).to(tensor.dtype) if len(shape) else torch.randn(()).to(tensor.dtype)


def other_size(r: random.Random, t: Tensor) -> Tensor:
    shape, k = list(t.shape), r.randrange(t.dim())
    shape[k] = r.choice([0, 1, max(shape[k] - 1, 0), shape[k] + 1, 2 * shape[k]])
    return of_shape(t, shape)


def fewer_rows(r: random.Random, t: Tensor) -> Tensor:
    return t[: r.randrange(t.size(0))].clone()


def permuted(r: random.Random, t: Tensor) -> Tensor:
    order = list(range(t.dim()))
    r.shuffle(order)
    return t.permute(order)


def odd_layout(r: random.Random, t: Tensor) -> Tensor:
    kinds: list[Callable[[], Tensor]] = [
        lambda: t.to_sparse(),
        lambda: t.to("meta"),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        lambda: t.to_mkldnn(),
        lambda: torch.nested.nested_tensor(list(t)),
        lambda: t.to_sparse_csr(),
    ]
    return r.choice(kinds)()


def inferred(r: random.Random, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def freed(t: Tensor, part: int = 0) -> Tensor:
    """Its storage holds nothing or half of it, as FSDP leaves parameters whose shards are elsewhere."""
    t = t.detach().clone(memory_format=torch.contiguous_format)
    t.untyped_storage().resize_(part and t.untyped_storage().nbytes() // part)
    return t


CHANGES: dict[str, Callable[[random.Random, Tensor], Any]] = {
    "size": other_size,
    "another_size": other_size,
    "fewer": fewer_rows,
    "rank_less": lambda r, t: t.select(r.randrange(t.dim()), 0),
    "rank_more": lambda r, t: t.unsqueeze(r.randrange(t.dim() + 1)),
    "any_shape": lambda r, t: of_shape(t, [r.choice([0, 1, 2, 3]) for _ in range(r.randrange(5))]),
    "ones": lambda r, t: of_shape(t, [r.choice([n, 1]) for n in t.shape]),
    "expanded": lambda r, t: of_shape(t, [r.choice([n, min(n, 1)]) for n in t.shape]).expand(t.shape),
    "permuted": permuted,
    "strided": lambda r, t: torch.stack([t, t], -1)[..., 0],
    "overlapping": lambda r, t: of_shape(t, [sum(t.shape) + 1]).as_strided(t.shape, (1,) * t.dim()),
    "cast": lambda r, t: t.to(r.choice(FLOATS + OTHERS)),
    "layout": odd_layout,
    "inferred": inferred,
    "requires_grad": lambda r, t: t.detach().requires_grad_(t.is_floating_point()),
    "negated": lambda r, t: torch._neg_view(t),
    "zero_tensor": lambda r, t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "subclass": lambda r, t: t.as_subclass(Mine),
    "nan": lambda r, t: t * float("nan"),
    "no_tensor": lambda r, t: r.choice([None, 1.5, "text", [1.0, 2.0], t.tolist(), (), object()]),
}


def changed(r: random.Random, value: Any, said: list[str]) -> Any:
    """`said` gets the name of what was done."""
    name = r.choice(list(CHANGES))
    value = CHANGES[name](r, value.detach())
    said.append(name)
    return value


def changed_states(r: random.Random, hx: Any, said: list[str]) -> Any:
    """hx with other states, or states in another container."""
    pair = isinstance(hx, tuple) and len(hx) == 2
    h, c = hx if pair else (hx[0], hx[0]) if isinstance(hx, tuple) else (hx, hx)
    change, seed = r.choice(list(CHANGES)), r.random()

    def both(t: Tensor) -> Any:
        return CHANGES[change](random.Random(seed), t)

    ways: dict[str, Callable[[], Any]] = {
        "first": lambda: (both(h), c) if pair else both(h),
        "second": lambda: (h, both(c)) if pair else both(h),
        "both": lambda: (both(h), both(c)) if pair else both(h),
        "list": lambda: [h, c],
        "one": lambda: (h,),
        "three": lambda: (h, c, c),
        "no_tuple": lambda: h,
        "None_inside": lambda: r.choice([(h, None), (None, c), (None, None), (None,)]),
        "swapped": lambda: (c, h),
        "stacked": lambda: torch.stack([h, c]),
        "dict": lambda: {"hx": h, "cx": c},
    }
    name = r.choice([*ways, *("first", "second", "both", "both") * 3])
    said.append(f"{name} {change}" if name in ("first", "second", "both") else name)
    return ways[name]()


def changed_batch_sizes(r: random.Random, sizes: Tensor, said: list[str]) -> Any:
    values, k = sizes.tolist(), r.randrange(sizes.numel())
    huge = r.choice([2**31, 2**62, -(2**62)])
    ways: dict[str, Callable[[], Any]] = {
        "one": lambda: torch.tensor([*values[:k], r.choice([0, -1, 1, huge, values[k] + 1]), *values[k + 1 :]]),
        "reversed": lambda: sizes.flip(0),
        "shorter": lambda: sizes[: r.randrange(len(values))],
        "longer": lambda: torch.tensor([*values, r.choice([0, 1, 5, -1, huge])]),
        "cast": lambda: sizes.to(r.choice([torch.int32, torch.float32, torch.bool, torch.uint8])),
        "meta": lambda: sizes.to("meta"),
        "rank": lambda: r.choice([sizes[None], sizes[:, None], sizes[0]]),
        "strided": lambda: torch.stack([sizes, sizes + 1], -1)[..., 0],
        "sparse": lambda: sizes.to_sparse(),
        "list": lambda: values,
        "zeros": lambda: torch.zeros_like(sizes),
        "None": lambda: None,
    }
    name = r.choice(list(ways))
    said.append(f"batch_sizes {name}")
    return ways[name]()


def changed_weights(r: random.Random, weights: Sequence[Tensor], said: list[str]) -> list:
    """Another list of weights; not all in it need be tensors."""
    weights = [weight.detach() for weight in weights]
    i, j = r.randrange(len(weights)), r.randrange(len(weights))
    way = r.choice(["one", "one", "one", "fewer", "fewer", "swapped", "dropped", "added", "none", "cast"])
    said.append(f"weights {way} {i} {j}")
    if way == "one":
        weights[i] = changed(r, weights[i], said)
    elif way == "fewer":
        weights[i] = fewer_rows(r, weights[i])
    elif way == "swapped":
        weights[i], weights[j] = weights[j], weights[i]
    elif way == "dropped":
        del weights[i : i + r.choice([1, 2, 4])]
    elif way == "added":
        weights.insert(j, weights[i])
    elif way == "cast":
        dtype = r.choice(FLOATS + OTHERS)
        weights = [weight.to(dtype) for weight in weights]
    return [] if way == "none" else weights


# ------------------------------------------------ what the documentation allows


def dense(t: Any) -> bool:
    """Whether this is a dense tensor on the CPU whose storage holds all of it."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.device.type != "cpu":
        return False
    if t.is_nested or t.is_quantized:
        return False
    if t.numel() == 0 or torch._is_zerotensor(t):
        return True
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.itemsize <= t.untyped_storage().nbytes()


def plain(*tensors: Any, mixed: bool = False) -> bool:
    """Whether all are dense and of one documented dtype; `mixed`: of any that torch computes with."""
    if not all(dense(t) and (mixed or t.dtype in FLOATS) for t in tensors):
        return False
    return mixed or len({t.dtype for t in tensors}) == 1


def packs(batch_sizes: Any, rows: int, strict: bool = True) -> bool:
    """Whether these can be the batch_sizes of so many rows; not `strict`: of fewer, and with zeros last, as torch's."""
    if not dense(batch_sizes) or batch_sizes.dim() != 1 or batch_sizes.dtype is not torch.int64:
        return False
    sizes = batch_sizes.clone().tolist()
    if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 0:
        return False
    return sum(sizes) == rows and sizes[-1] > 0 if strict else sum(sizes) <= rows


def measures(lengths: Any, batch: int, steps: int) -> bool:
    """Whether these can be the lengths of a batch."""
    if not dense(lengths) or lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (batch,):
        return False
    return all(0 <= length <= steps for length in lengths.clone().tolist())


class Shapes(NamedTuple):
    """The sizes of a stack of layers, and with them the documented shapes of everything."""

    cell: str
    input_size: int
    hidden_size: int
    proj_size: int = 0
    layers: int = 1
    directions: int = 1
    bias: bool = True

    @property
    def output_size(self) -> int:
        return self.proj_size or self.hidden_size

    def weights(self) -> list[tuple[int, ...]]:
        rows = GATES[self.cell] * self.hidden_size
        shapes: list[tuple[int, ...]] = []
        for k in range(self.layers):
            width = self.input_size if k == 0 else self.directions * self.output_size
            own = [(rows, width), (rows, self.output_size), *[(rows,)] * (2 * self.bias)]
            shapes += (own + [(self.output_size, self.hidden_size)] * bool(self.proj_size)) * self.directions
        return shapes

    def states(self, *batch: int) -> list[tuple[int, ...]]:
        ahead = self.layers * self.directions, *batch
        return [(*ahead, self.output_size), (*ahead, self.hidden_size)][: 2 if self.cell == "lstm" else 1]

    def allow(
        self,
        input: Any,
        states: Any,
        weights: Any,
        batch_sizes: Any = None,
        lengths: Any = None,
        *,
        batch_first: bool = False,
        mixed: bool = False,
        strict: bool = True,
    ) -> bool:
        """Whether the documentation allows these arguments; `states` and any of them may be None for zeros."""
        if not isinstance(weights, (list, tuple)) or not isinstance(states, (list, tuple, type(None))):
            return False
        given = [state for state in states or () if state is not None]
        if not plain(input, *weights, *given, mixed=mixed) or [tuple(w.shape) for w in weights] != self.weights():
            return False
        time, rows = (1, 0) if batch_first else (0, 1)
        if batch_sizes is not None:
            if lengths is not None or input.dim() != 2 or not packs(batch_sizes, len(input), strict):
                return False
            batch = int(batch_sizes[0])
        elif input.dim() != 3 or input.size(time) == 0:
            return False
        else:
            batch = input.size(rows)
        if lengths is not None and not measures(lengths, batch, input.size(time)):
            return False
        wanted = self.states(batch)
        if input.size(-1) != self.input_size or (states is not None and len(states) != len(wanted)):
            return False
        pairs = zip(states or wanted, wanted, strict=True)
        return states is None or all(state is None or tuple(state.shape) == shape for state, shape in pairs)


def random_shapes(r: random.Random, stack: bool = True) -> Shapes:
    cell, hidden = r.choice(list(GATES)), r.choice(SIZES)
    proj = r.randrange(1, hidden) if cell == "lstm" and hidden > 1 and stack and r.random() < 0.3 else 0
    layers, directions = (r.choice([1, 1, 2, 3]), r.choice([1, 2])) if stack else (1, 1)
    return Shapes(cell, r.choice(SIZES), hidden, proj, layers, directions, r.random() < 0.8)


def random_batch_sizes(r: random.Random) -> Tensor:
    return torch.tensor(sorted((r.choice([1, 2, 3]) for _ in range(r.choice([1, 2, 4]))), reverse=True))


def text_of(value: Any) -> str:
    if isinstance(value, Tensor):
        if dense(value) and value.dtype is torch.int64 and value.numel() < 9:
            return str(value.clone().tolist())
        kind = "" if dense(value) else f" {value.device} {value.layout}"
        return f"{str(value.dtype)[6:]}{'' if value.is_nested else list(value.shape)}{kind}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(text_of, value))})"
    return repr(value)[:40]
