"""Modes that see every operator or function, FLOP counters, profilers and tensor subclasses."""

import warnings

import pytest
import torch
from support.torch_tools import (
    LAYERS,
    Model,
    Own,
    Rows,
    assert_plant_is_caught,
    leaf,
    sample,
    train,
    weight,
    weight_name,
)
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    state_of,
    tensors,
    total,
    twins,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# ------------------------------------------------ modes

MODES = Rows()


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Refusing(TorchDispatchMode):
    """Raises at the operators of a recurrent layer, and at every matrix product."""

    def __init__(self, error):
        super().__init__()
        self.error, self.count = error, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(part in name for part in ("rnn", "gru", "lstm", "mm", "linear")):
            self.count += 1
            raise self.error("refused")
        return function(*args, **(kwargs or {}))


class CountingFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class RefusingFunctions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        raise Own


@MODES.add()
def dispatch_mode(module):
    with Counting() as mode:
        result = train(module)
    return result, mode.count > 0


@MODES.add()
def dispatch_mode_without_grad(module):
    with Counting() as mode, torch.no_grad():
        result = module(sample(module))
    return result, mode.count > 0


for error in (Own, RuntimeError, NotImplementedError, ValueError):

    def refused(module, error=error):
        with Refusing(error):
            return module(sample(module))

    MODES[f"dispatch_mode_raises_{error.__name__}"] = refused


@MODES.add()
def dispatch_mode_raises_in_backward(module):
    loss = total(module(leaf(module)))
    with Refusing(Own):
        loss.backward()


@MODES.add()
def function_mode(module):
    with CountingFunctions() as mode:
        result = train(module)
    return result, mode.count > 0


@MODES.add()
def function_mode_raises(module):
    x = sample(module)
    with RefusingFunctions():
        return module(x)


@MODES.add()
def device_mode(module):
    with torch.device("cpu"):
        return train(module)


@MODES.add()
def disabled_torch_function(module):
    with torch._C.DisableTorchFunctionSubclass():
        return train(module)


# ------------------------------------------------ counters and profilers

COUNTERS = Rows()


def flops(run):
    def program(module):
        with FlopCounterMode(display=False) as counter:
            run(module)
        return counter.get_total_flops(), sample(module)

    return program


COUNTED = (
    "rnn_tanh",
    "gru",
    "lstm_proj",
    "rnncell_tanh",
    "grucell",
    "lstmcell",
)
COUNTERS.put("flops_forward", flops(lambda m: m(sample(m))), kinds=COUNTED)
COUNTERS.put("flops_no_grad", flops(lambda m: torch.no_grad()(m)(sample(m))), kinds=COUNTED)
COUNTERS.put("flops_training", flops(train), kinds=COUNTED)
COUNTERS.put("flops_frozen_input", flops(lambda m: total(m(sample(m))).backward()), kinds=COUNTED)
COUNTERS.put("flops_deep", flops(train), kinds=COUNTED[:3], num_layers=2, bidirectional=True)
COUNTERS.put("flops_deep_forward", flops(lambda m: m(sample(m))), kinds=COUNTED[:3], num_layers=2, bidirectional=True)


def test_flops_of_an_lstm():
    """torch.nn's LSTM counts 0 in float32; in float64, where it is not oneDNN's, it counts all."""
    ours, _ = twins("lstm")
    _, theirs = twins("lstm", dtype=torch.float64)
    for run in (train, lambda m: m(sample(m))):
        assert flops(run)(ours)[0] == flops(run)(theirs)[0] > 0


@COUNTERS.add()
def flops_by_module(module):
    """Where the counter finds them, by the names of modules."""
    if isinstance(module, nn.LSTM) and not module.proj_size:
        return sample(module)
    model = Model(module)
    with FlopCounterMode(display=False) as counter:
        model(sample(module))
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}, sample(module)


@COUNTERS.add()
def profiler(module):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        result = train(module)
    return result, len(seen.key_averages()) > 0


@COUNTERS.add()
def profiler_with_everything(module):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        record_shapes=True,
        with_stack=True,
        with_flops=True,
        with_modules=True,
        profile_memory=True,
    ):
        return train(module)


@COUNTERS.add()
def profiler_schedule(module):
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=1)
    with torch.profiler.profile(schedule=schedule) as seen:
        for _ in range(3):
            result = module(sample(module))
            seen.step()
    return result


@COUNTERS.add()
def autograd_profiler(module):
    with torch.autograd.profiler.profile(record_shapes=True):
        return train(module)


# ------------------------------------------------ tensors of a class of their own

SUBCLASSES = Rows()


class Tagged(torch.Tensor):
    """Counts what is asked of it, and stays what it is."""


class Logged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Refused(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "rnn" in str(function) or "gru" in str(function) or "lstm" in str(function):
            raise Own
        return super().__torch_function__(function, types, args, kwargs or {})


class Parameterish(nn.Parameter):
    pass


def of_class(cls, where):
    def program(module):
        if where == "weight":
            module._parameters[weight_name(module)] = weight(module).detach().as_subclass(cls).requires_grad_()
            if hasattr(module, "_init_flat_weights"):
                module._init_flat_weights()
            result = module(sample(module))
        else:
            result = module(sample(module).as_subclass(cls))
        return [type(t).__name__ for t in tensors(result)], [t.as_subclass(torch.Tensor) for t in tensors(result)]

    return program


for cls in (Tagged, Logged, Refused, Parameterish):
    for where in ("input", "weight"):
        if cls is not Parameterish or where == "weight":
            SUBCLASSES[f"{cls.__name__}_{where}"] = of_class(cls, where)


@SUBCLASSES.add()
def tagged_states(module):
    states = state_of(module, 2)
    states = tuple(s.as_subclass(Tagged) for s in states) if isinstance(states, tuple) else states.as_subclass(Tagged)
    return [t.as_subclass(torch.Tensor) for t in tensors(module(sample(module), states))]


@SUBCLASSES.add()
def buffer_subclass_input(module):
    return module(nn.Buffer(sample(module)))


@SUBCLASSES.add()
def masked_tensor_input(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.masked.masked_tensor(sample(module), sample(module) > 0)
        return module(x)


@SUBCLASSES.add()
def nested_tensor_input(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module(torch.nested.nested_tensor([sample(module)[0], sample(module)[0]]))


@MODES.parametrize()
def test_modes(name, kind):
    MODES.check(name, kind)


@COUNTERS.parametrize()
def test_counters(name, kind):
    COUNTERS.check(name, kind)


@SUBCLASSES.parametrize()
def test_subclasses(name, kind):
    SUBCLASSES.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(MODES)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_refused_operator_runs_once(kind):
    """An exception of a mode ends the call: no other path is tried."""
    ours, _ = twins(kind)
    with pytest.raises(Own), Refusing(Own) as mode:
        ours(leaf(ours))
    assert mode.count == 1
