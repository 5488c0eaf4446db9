"""torch.nn.utils.rnn and torch.nn.init around the modules."""

import copy

import torch
from support.torch_tools import LAYERS, Model, Rows, assert_plant_is_caught, first, is_cell, leaf, sample, train
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    state_of,
    total,
)
from torch import nn
from torch.nn import init
from torch.nn.utils import rnn as rnn_utils

# ------------------------------------------------ torch.nn.utils.rnn

SEQUENCES = Rows(kinds=LAYERS)


def ragged(module):
    x = sample(module)
    return [x[:2, 0], x[:, 1], x[:1, 0]]


def through(pack):
    def program(module):
        packed = pack(module)
        data = packed.data.detach().requires_grad_()
        output, state = module(packed._replace(data=data))
        padded, lengths = rnn_utils.pad_packed_sequence(output, total_length=7, padding_value=-1.0)
        total((padded, state)).backward()
        return output, state, padded, lengths, data.grad, rnn_utils.unpack_sequence(output)

    return program


SEQUENCES["pack_sequence"] = through(lambda m: rnn_utils.pack_sequence(ragged(m), enforce_sorted=False))
SEQUENCES["pack_padded_sequence"] = through(lambda m: rnn_utils.pack_padded_sequence(sample(m), [5, 3]))
SEQUENCES["pack_padded_list"] = through(
    lambda m: rnn_utils.pack_padded_sequence(sample(m), [2, 5], enforce_sorted=False)
)
SEQUENCES["packed_by_hand"] = through(
    lambda m: rnn_utils.PackedSequence(sample(m).flatten(0, 1)[:6], torch.tensor([3, 2, 1]))
)
SEQUENCES["packed_with_indices"] = through(
    lambda m: rnn_utils.PackedSequence(
        sample(m).flatten(0, 1)[:6], torch.tensor([3, 2, 1]), torch.tensor([2, 0, 1]), None
    )
)
SEQUENCES["packed_to"] = through(lambda m: rnn_utils.pack_padded_sequence(sample(m).double(), [5, 3]).to(torch.float32))
SEQUENCES["packed_float"] = through(lambda m: rnn_utils.pack_padded_sequence(sample(m).double(), [5, 3]).float())
SEQUENCES["packed_double"] = lambda m: m(rnn_utils.pack_padded_sequence(sample(m), [5, 3]).double())
SEQUENCES["packed_deepcopy"] = through(lambda m: copy.deepcopy(rnn_utils.pack_padded_sequence(sample(m), [5, 3])))
SEQUENCES["pad_sequence"] = lambda m: m(rnn_utils.pad_sequence(ragged(m), padding_value=0.5))
SEQUENCES["pad_sequence_left"] = lambda m: m(rnn_utils.pad_sequence(ragged(m), padding_side="left"))
SEQUENCES["packed_as_a_tuple"] = lambda m: m(tuple(rnn_utils.pack_padded_sequence(sample(m), [5, 3])))
SEQUENCES["packed_with_2d_states"] = lambda m: m(rnn_utils.pack_padded_sequence(sample(m), [5, 3]), state_of(m, None))


@SEQUENCES.add()
def unpad_sequence(module):
    output, _ = module(sample(module))
    return rnn_utils.unpad_sequence(output, torch.tensor([2, 5]))


@SEQUENCES.add()
def invert_permutation(module):
    packed = rnn_utils.pack_sequence(ragged(module), enforce_sorted=False)
    output, _ = module(packed)
    return output.data, rnn_utils.invert_permutation(output.sorted_indices), output.unsorted_indices


@SEQUENCES.add(num_layers=2, bidirectional=True)
def packed_with_states(module):
    packed = rnn_utils.pack_sequence(ragged(module), enforce_sorted=False)
    return module(packed, state_of(module, 3))


@SEQUENCES.add()
def packed_is_pinned_and_moved(module):
    packed = rnn_utils.pack_padded_sequence(sample(module), [5, 3]).cpu()
    output, _ = module(packed)
    return output.data, output.is_pinned(), output.is_cuda


# ------------------------------------------------ torch.nn.init

INIT = Rows()
for name, args in {
    "uniform_": (-0.1, 0.1),
    "normal_": (0.0, 0.1),
    "trunc_normal_": (0.0, 0.1),
    "constant_": (0.1,),
    "ones_": (),
    "zeros_": (),
    "eye_": (),
    "xavier_uniform_": (),
    "xavier_normal_": (),
    "kaiming_uniform_": (),
    "kaiming_normal_": (),
    "orthogonal_": (),
    "sparse_": (0.5,),
    "dirac_": (),  # for convolutions: an error in both
}.items():

    def initialized(module, name=name, args=args):
        for parameter in module.parameters():
            if parameter.dim() == 2:
                getattr(init, name)(parameter, *args)
        return train(module)

    INIT[name] = initialized


@INIT.add()
def applied(module):
    """Model.apply with a function that asks for the class by isinstance."""

    def start(one):
        if isinstance(one, (nn.RNNBase, nn.RNNCellBase)):
            for name, parameter in one.named_parameters():
                init.orthogonal_(parameter) if "weight" in name else init.zeros_(parameter)

    model = Model(module)
    model.apply(start)
    return model(sample(module)), first(module(leaf(module)))


@INIT.add()
def forget_gate_bias(module):
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.data[1:2].fill_(1.0)
    return train(module), is_cell(module)


@SEQUENCES.parametrize()
def test_rnn(name, kind):
    SEQUENCES.check(name, kind)


@INIT.parametrize()
def test_init(name, kind):
    INIT.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(INIT)
