"""One table per cell: gates, states, weights by role, saved tensors. Everything that differs between cells is here.

The operators' schemas, the checks, the modules and the reference loop follow from these tables. No other place names or
counts weights: `layouts` and `counts` say which a layer has, `arrangement_of` finds it out from a flat list of them.

To add a cell, write its table here and its step in reference.py. Where `operators` and `torch_operator` are None, it
runs on the backend "reference", and all others refuse it.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

BIAS, PROJECTION = "bias", "projection"  # the options of a layer that add weights
INPUT, GATES, HIDDEN, OUTPUT = range(4)  # the fields of Sizes; the axes of a shape are some of them


class Sizes(NamedTuple):
    """The sizes of one layer that the shapes of its weights and states are made of."""

    input: int  # input_size I; in later layers, the width of the output before it
    gates: int  # rows of weight_ih: the number of gates times hidden_size, G * H
    hidden: int  # hidden_size H
    output: int  # Hout: proj_size where projected, else hidden_size


class Weight(NamedTuple):
    """One role: a weight that every direction of a layer has, or has where the layer has an option."""

    name: str  # torch.nn's attribute, without its layer and direction
    axes: tuple[int, ...]  # its shape, as fields of Sizes
    option: str | None = None  # BIAS or PROJECTION; None: always there
    read_for: str | None = None
    """Which gradients backward reads it for: "input", "states" or "all"; None: backward never reads it."""


class State(NamedTuple):
    """One state, [D, B, size]: its letter, as in hx and h_n, and its size, as a field of Sizes."""

    letter: str
    axis: int


class Saved(NamedTuple):
    """A tensor that forward saves for backward: [D, rows, planes * H]."""

    planes: int
    wide: bool = False  # float32 where the other tensors have a 16-bit type


class Layout(NamedTuple):
    """Which weights one direction of a layer has: the roles without an option, and those of the layer's options."""

    options: tuple[str, ...]
    weights: tuple[Weight, ...]
    names: tuple[str, ...]
    axes: tuple[tuple[int, ...], ...]


class Arrangement(NamedTuple):
    """How a flat list holds the weights of one layer: `layout` repeated for each of 1 or 2 directions."""

    layout: Layout
    directions: int
    place: int | None = None
    """The tensor that tells this arrangement from the later ones of the same length; None: there are no later ones."""
    rank: int = 0
    """The number of dimensions that the tensor at `place` has in this arrangement alone."""


class Counts(NamedTuple):
    """How many weights a direction has, by the options that torch.nn knows; 0 where no layer has them."""

    bare: int
    biased: int
    projected: int
    both: int


class CellSpec(NamedTuple):
    """What is known of one cell."""

    name: str  # also the function of `functional`
    operators: str | None  # torch.ops.rnnfast.{operators}_*; None: no kernels have this cell
    flags: tuple[tuple[str, bool], ...]  # the operators' own trailing arguments
    torch_operator: str | None  # in torch._VF; None: torch does not have this cell
    gates: str  # a letter each
    states: tuple[State, ...]
    saved: tuple[Saved, ...]  # without any, backward reads the output instead
    layouts: tuple[Layout, ...]
    counts: Counts
    arrangements: dict[int, tuple[Arrangement, ...]]  # by the length of the flat list of one layer
    no_states: tuple[None, ...]  # stands for states of zeros


def _spec(
    name: str,
    operators: str | None,
    torch_operator: str | None,
    gates: str,
    states: str,
    saved: Sequence[Saved] = (),
    flags: Sequence[tuple[str, bool]] = (),
    projection: bool = False,
) -> CellSpec:
    """The table of a cell whose weights have torch.nn's roles."""
    weights = [
        Weight("weight_ih", (GATES, INPUT), read_for="input"),
        Weight("weight_hh", (GATES, OUTPUT), read_for="states"),
        Weight("bias_ih", (GATES,), BIAS),
        Weight("bias_hh", (GATES,), BIAS),
    ]
    if projection:
        weights.append(Weight("weight_hr", (OUTPUT, HIDDEN), PROJECTION, read_for="all"))
    return spec_of(name, operators, torch_operator, gates, states, weights, saved, flags)


def spec_of(
    name: str,
    operators: str | None,
    torch_operator: str | None,
    gates: str,
    states: str,
    weights: Sequence[Weight],
    saved: Sequence[Saved] = (),
    flags: Sequence[tuple[str, bool]] = (),
) -> CellSpec:
    """The table of a cell; `weights` are all roles, in torch.nn's flat order."""
    options = list(dict.fromkeys(weight.option for weight in weights if weight.option is not None))
    chosen = [c for n in range(len(options) + 1) for c in itertools.combinations(options, n)]
    layouts = tuple(_layout(weights, some) for some in chosen)
    lengths = {layout.options: len(layout.weights) for layout in layouts}
    counts = Counts(*(lengths.get(some, 0) for some in ((), (BIAS,), (PROJECTION,), (BIAS, PROJECTION))))
    axes = {"h": OUTPUT, "c": HIDDEN}
    return CellSpec(
        name,
        operators,
        tuple(flags),
        torch_operator,
        gates,
        tuple(State(letter, axes[letter]) for letter in states),
        tuple(saved),
        layouts,
        counts,
        _arrangements(layouts),
        (None,) * len(states),
    )


def _layout(weights: Sequence[Weight], options: tuple[str, ...]) -> Layout:
    own = tuple(weight for weight in weights if weight.option is None or weight.option in options)
    return Layout(options, own, tuple(weight.name for weight in own), tuple(weight.axes for weight in own))


def _arrangements(layouts: Sequence[Layout]) -> dict[int, tuple[Arrangement, ...]]:
    """All arrangements by length. Raises ValueError if one cannot be told from another."""
    by_length: dict[int, list[tuple[Layout, int, list[int]]]] = {}
    for directions in (2, 1):
        for layout in layouts:
            ranks = [len(axes) for axes in layout.axes] * directions
            by_length.setdefault(len(ranks), []).append((layout, directions, ranks))
    return {
        length: tuple(
            _told_apart(*one, later=[ranks for _, _, ranks in candidates[i + 1 :]]) for i, one in enumerate(candidates)
        )
        for length, candidates in by_length.items()
    }


def _told_apart(layout: Layout, directions: int, ranks: list[int], later: list[list[int]]) -> Arrangement:
    if not later:
        return Arrangement(layout, directions)
    for place, rank in enumerate(ranks):
        if all(other[place] != rank for other in later):
            return Arrangement(layout, directions, place, rank)
    raise ValueError(f"weights with options {layout.options} cannot be told from others of the same number")


SPECS = {
    "rnn_tanh": _spec("rnn_tanh", "rnn", "rnn_tanh", "a", "h", flags=[("relu", False)]),
    "rnn_relu": _spec("rnn_relu", "rnn", "rnn_relu", "a", "h", flags=[("relu", True)]),
    "gru": _spec("gru", "gru", "gru", "rzn", "h", [Saved(4)]),  # r z n and W_hn h + b_hn
    "lstm": _spec("lstm", "lstm", "lstm", "ifgo", "hc", [Saved(4), Saved(1, wide=True)], projection=True),  # i f g o; c
}
"""Cell -> its table."""

FAMILIES: dict[str, CellSpec] = {spec.operators: spec for spec in reversed(SPECS.values()) if spec.operators}
"""The operators' names -> a table. The two RNNs have the same operators, and differ in a flag."""


def arrangement_of(spec: CellSpec, weights: Sequence[Tensor]) -> Arrangement | None:
    """How `weights`, those of one layer, are arranged; None where no layer of this cell has as many."""
    for arrangement in spec.arrangements.get(len(weights), ()):
        if arrangement.place is None or weights[arrangement.place].dim() == arrangement.rank:
            return arrangement
    return None


def layout_with(spec: CellSpec, bias: bool, projection: bool) -> Layout | None:
    """The layout that has these options and no other; None where no layer of this cell has them."""
    options = (BIAS,) * bool(bias) + (PROJECTION,) * bool(projection)
    return next((layout for layout in spec.layouts if layout.options == options), None)


def shapes_of(layout: Layout, sizes: Sizes) -> list[tuple[int, ...]]:
    """The shapes of the weights of one direction."""
    return [tuple([sizes[axis] for axis in axes]) for axes in layout.axes]


def step_weights(spec: CellSpec) -> tuple[Weight, ...]:
    """The roles of a cell module, which takes one step: biases if it has them, never a projection."""
    return next(layout.weights for layout in spec.layouts if layout.options == (BIAS,))
