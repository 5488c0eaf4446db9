"""PyTorch's own module samples for nn.RNN, GRU, LSTM and the cells, run on rnnfast's classes.

Samples, references and error inputs are those of torch.testing._internal.common_modules; each test does with them what
PyTorch's test_modules.py does.
"""

import copy
import io
import itertools
import pickle
import re

import pytest
import torch
from support.twins import (
    assert_bitwise,
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    tensors,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import rnnfast

pytest.importorskip("expecttest", reason="expecttest, which torch.testing._internal imports, is not installed")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db  # noqa: E402
from torch.testing._internal.common_utils import freeze_rng_state  # noqa: E402

INFOS = [info for info in module_db if issubclass(info.module_cls, (nn.RNNBase, nn.RNNCellBase))]

every_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def ours_of(info):
    return getattr(rnnfast, info.module_cls.__name__)


def samples(info, dtype=torch.float64, requires_grad=False, training=True, **kwargs):
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **kwargs
    )
    assert found, f"torch has no samples for {info.name}"
    return found


def build(info, sample, dtype=torch.float64, training=True):
    """(ours, theirs) of one sample with equal weights."""
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = info.module_cls(*args, **kwargs, dtype=dtype).train(training)
    ours = ours_of(info)(*args, **kwargs, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(module, sample):
    with freeze_rng_state():
        return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def test_all_six_classes_have_samples():
    assert {info.module_cls for info in INFOS} == {nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell}


@every_info
@every_dtype
@both_modes
def test_forward(info, dtype, training):
    references = 0
    for sample in samples(info, dtype, training=training):
        ours, theirs = build(info, sample, dtype, training)
        output = run(ours, sample)
        assert_same(output, run(theirs, sample), sample.desc)
        if sample.reference_fn is not None:
            args, kwargs = copy.deepcopy((sample.forward_input.args, sample.forward_input.kwargs))
            reference = sample.reference_fn(ours, *args, **kwargs)
            torch.testing.assert_close(tensors(output), tensors(reference))
            references += 1
    assert references > 0


@pytest.mark.parametrize("info", [i for i in INFOS if i.module_cls in (nn.RNN, nn.GRU)], ids=lambda info: info.name)
@both_modes
def test_forward_packed(info, training):
    found = samples(info, training=training, requires_grad=True, with_packed_sequence=True)
    found = [sample for sample in found if isinstance(sample.forward_input.args[0], PackedSequence)]
    assert found
    for sample in found:
        ours, theirs = build(info, sample, training=training)
        results = []
        for module in (ours, theirs):
            output = run(module, sample)
            inputs = [sample.forward_input.args[0].data, *module.parameters()]
            results.append((output, torch.autograd.grad(sum(t.sum() for t in (output[0].data, output[1])), inputs)))
        assert_same(*results)


@every_info
def test_factory_keywords(info):
    cls = ours_of(info)
    for sample in samples(info):
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        for dtype in (torch.float16, torch.float64):
            assert {p.dtype for p in cls(*args, **kwargs, dtype=dtype).parameters()} == {dtype}
        assert {p.device.type for p in cls(*args, **kwargs, device="meta").parameters()} == {"meta"}
        assert {p.device.type for p in cls(*args, **kwargs, device=torch.device("cpu")).parameters()} == {"cpu"}


@every_info
def test_pickle_and_repr(info):
    for sample in samples(info):
        ours, theirs = build(info, sample)
        assert repr(ours) == repr(theirs)
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        for revived in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(ours))):
            assert_bitwise(run(revived, sample), run(ours, sample))


def as_noncontiguous(value):
    if isinstance(value, tuple):
        return tuple(as_noncontiguous(v) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    wide = torch.stack([value.detach(), torch.full_like(value, torch.nan)], -1).flatten(-2)
    return wide[..., ::2].requires_grad_(value.requires_grad)


@every_info
@both_modes
def test_non_contiguous(info, training):
    for sample in samples(info, training=training, requires_grad=True):
        ours, _ = build(info, sample, training=training)
        results = []
        for layout in (lambda value: value, as_noncontiguous):
            ours.zero_grad()
            args = tuple(layout(arg) for arg in sample.forward_input.args)
            kwargs = {name: layout(value) for name, value in sample.forward_input.kwargs.items()}
            output = ours(*args, **kwargs)
            leaves = tensors((args, kwargs))
            sum(t.sum() for t in tensors(output)).backward()
            results.append((output, [leaf.grad for leaf in leaves], [p.grad for p in ours.parameters()]))
            for leaf in leaves:
                leaf.grad = None
        assert_same(results[1], results[0])
        assert any(not t.is_contiguous() for t in leaves)


def grad_function(module, sample):
    """A function of every floating-point tensor of the sample and every parameter, for gradcheck; and its arguments."""
    names = [name for name, _ in module.named_parameters()]
    inputs = [t.detach().clone().requires_grad_() for t in tensors(sample.forward_input.args)]
    inputs += [t.detach().clone().requires_grad_() for t in tensors(sample.forward_input.kwargs)]
    parameters = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def function(*flat):
        given, rest = iter(flat[: len(inputs)]), flat[len(inputs) :]

        def refill(value):
            if isinstance(value, tuple):
                return tuple(refill(v) for v in value)
            return next(given) if isinstance(value, torch.Tensor) else value

        args = refill(tuple(sample.forward_input.args))
        kwargs = {name: refill(value) for name, value in sample.forward_input.kwargs.items()}
        return tuple(tensors(torch.func.functional_call(module, dict(zip(names, rest, strict=True)), args, kwargs)))

    return function, [*inputs, *parameters]


@every_info
@both_modes
def test_grad(info, training):
    for sample in samples(info, training=training):
        function, arguments = grad_function(build(info, sample, training=training)[0], sample)
        assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.quick(2)
@every_info
def test_gradgrad(info):
    assert info.supports_gradgrad
    for sample in itertools.islice(samples(info), 0, None, 5):
        function, arguments = grad_function(build(info, sample)[0], sample)
        assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@every_info
@every_dtype
@both_modes
def test_error_inputs(info, dtype, training):
    """torch's error inputs: class and pattern as torch's list says, class and text as torch.nn's very exception."""
    found = info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    assert found
    for error_input in found:
        sample = error_input.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        raised = []
        for cls in (ours_of(info), info.module_cls):
            if error_input.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
                with pytest.raises(error_input.error_type, match=error_input.error_regex) as caught:
                    cls(*args, **kwargs)
            else:
                module = cls(*args, **{"dtype": dtype, **kwargs}).train(training)
                with pytest.raises(error_input.error_type, match=error_input.error_regex) as caught:
                    run(module, sample)
            raised.append((caught.type, re.sub(r"0x[0-9a-f]+", "", str(caught.value))))
        assert raised[0] == raised[1]


@every_info
@both_modes
def test_to_and_to_empty(info, training):
    sample = samples(info)[-1]
    ours, theirs = build(info, sample, torch.float32, training)
    state = copy.deepcopy(theirs.state_dict())
    assert ours.to(torch.float64) is ours and {p.dtype for p in ours.parameters()} == {torch.float64}
    ours.to("meta")
    assert {p.device.type for p in ours.parameters()} == {"meta"}
    ours.to_empty(device="cpu")
    ours.load_state_dict(state)
    assert_same(run(ours, sample), run(theirs.to(torch.float64), sample))


@every_info
def test_save_load_state_dict(info):
    for sample in samples(info):
        ours, _ = build(info, sample)
        buffer = io.BytesIO()
        torch.save(ours.state_dict(), buffer)
        buffer.seek(0)
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        fresh = ours_of(info)(*args, **kwargs, dtype=torch.float64)
        assert not any(torch.equal(a, b) for a, b in zip(fresh.parameters(), ours.parameters(), strict=True))
        fresh.load_state_dict(torch.load(buffer, weights_only=True))
        assert_bitwise(run(fresh, sample), run(ours, sample))


@every_info
def test_no_state_besides_torchs(info):
    """After use a module holds nothing that torch's does not: nothing to go stale, to pickle or to leak."""
    for sample in samples(info):
        ours, theirs = build(info, sample)
        run(ours, sample), run(theirs, sample)
        assert vars(ours).keys() == vars(theirs).keys()
        assert [name for name, _ in ours.named_buffers()] == []
