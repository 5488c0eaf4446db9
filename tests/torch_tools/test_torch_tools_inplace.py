"""Writing in place to what a module returned, and to what it was given, between forward and backward."""

import torch
from support.torch_tools import CELLS, KINDS, LAYERS, Rows, assert_plant_is_caught, call, first, leaf, leaves, sample
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    tensors,
    total,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


def cloned(value):
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_floating_point() else value
    if isinstance(value, PackedSequence):
        return value._replace(data=value.data.clone())
    return tuple(cloned(one) for one in value)


def returns_clones(module):
    module.register_forward_hook(lambda module, args, result: cloned(result))


ROWS = Rows(
    better="torch's own kernels that keep their result for backward raise where it was written to",
    prepare=returns_clones,
)


# ------------------------------------------------ operations on the output


def with_output(change, module, run=call):
    """The gradients after `change(output)`, where all results count."""
    inputs = leaves(module)
    result = run(module, *inputs)
    found = change(tensors(result)[0])
    (total(result) + (0 if found is None else total(found))).backward()
    return result, [value.grad for value in inputs]


def set_rows(output):
    output[:, 0] = 0


def chained(output):
    output.add_(1).mul_(0.5)
    output.tanh_()


def twice(output):
    """Used before and after the write."""
    before = output.sum()
    output.mul_(2)
    return before * 3


def under_no_grad(output):
    with torch.no_grad():
        output.mul_(2)


OPERATIONS = {
    "relu_": lambda o: o.relu_(),
    "add_": lambda o: o.add_(1),
    "add_itself_": lambda o: o.add_(o),
    "mul_": lambda o: o.mul_(2),
    "mul_by_itself_": lambda o: o.mul_(o.detach()),
    "sub_": lambda o: o.sub_(o.mean()),
    "div_": lambda o: o.div_(3),
    "masked_fill_": lambda o: o.masked_fill_(torch.arange(o.shape[-1]) % 2 == 0, -1.0),
    "zero_": lambda o: o.zero_(),
    "clamp_": lambda o: o.clamp_(-0.1, 0.1),
    "sigmoid_": lambda o: o.sigmoid_(),
    "copy_": lambda o: o.copy_(o.detach().flip(0)),
    "dropout": lambda o: functional.dropout(o, 0.5, inplace=True),
    "leaky_relu": lambda o: functional.leaky_relu_(o, 0.2),
    "relu_module": lambda o: nn.ReLU(inplace=True)(o),
    "slice_mul_": lambda o: o[-1].mul_(2),
    "narrow_": lambda o: o.narrow(-1, 0, 2).add_(1),
    "view_relu_": lambda o: o.view(-1, o.shape[-1]).relu_(),
    "unbind_": lambda o: o.unbind(0)[0].mul_(1),
    "setitem": set_rows,
    "index_add_": lambda o: o.index_add_(0, torch.tensor([0]), torch.ones_like(o[:1])),
    "index_put_": lambda o: o.index_put_((torch.tensor([0]),), torch.ones_like(o[:1])),
    "transpose_": lambda o: o.transpose_(0, 1),
    "unsqueeze_": lambda o: o.unsqueeze_(0),
    "out": lambda o: torch.mul(o.detach(), 2, out=o.detach()),
    "detached_mul_": lambda o: o.detach().mul_(2),
    "no_grad_mul_": under_no_grad,
    "chained": chained,
    "twice": twice,
    "detach_": lambda o: o.detach_(),
    "requires_grad_false": lambda o: o.requires_grad_(False),
    "resize_": lambda o: o.resize_(o.shape[0], 1),
}
for name, operation in OPERATIONS.items():
    ROWS[name] = lambda module, operation=operation: with_output(operation, module)


# ------------------------------------------------ kinds of layers


def packed(module, x, *states):
    return call(module, pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False), *states)


def shapes(module, x, *states):
    return call(module, x.transpose(0, 1), *states)


for name in ("relu_", "mul_", "slice_mul_", "no_grad_mul_", "dropout"):
    operation = OPERATIONS[name]

    def program(module, operation=operation):
        return with_output(operation, module)

    def of_packed(module, operation=operation):
        return with_output(operation, module, packed)

    def of_batch_first(module, operation=operation):
        return with_output(operation, module, shapes)

    ROWS.put(f"{name}_two_layers", program, kinds=LAYERS, num_layers=2)
    ROWS.put(f"{name}_both_ways", program, kinds=LAYERS, bidirectional=True)
    ROWS.put(f"{name}_no_bias", program, bias=False)
    ROWS.put(f"{name}_float64", program, dtype=torch.float64)
    ROWS.put(f"{name}_packed", of_packed, kinds=LAYERS)
    ROWS.put(f"{name}_packed_deep", of_packed, kinds=LAYERS, num_layers=2, bidirectional=True)
    ROWS.put(f"{name}_batch_first", of_batch_first, kinds=LAYERS, batch_first=True)
    ROWS.put(f"{name}_with_dropout", program, kinds=LAYERS, num_layers=2, dropout=0.5)


@ROWS.add(kinds=LAYERS)
def unbatched(module):
    x = leaf(module)
    output, _ = module(x[:, 0])
    output.relu_().mul_(2)
    output.sum().backward()
    return output, x.grad


@ROWS.add()
def without_states(module):
    x = leaf(module)
    output = first(module(x))
    output.relu_()
    output.sum().backward()
    return output, x.grad


# ------------------------------------------------ the states


def with_state(change, module, i):
    inputs = leaves(module)
    result = call(module, *inputs)
    change(tensors(result)[i])
    total(result).backward()
    return result, [value.grad for value in inputs]


for name in ("relu_", "mul_", "zero_", "slice_mul_", "no_grad_mul_", "detach_"):
    operation = OPERATIONS[name]
    ROWS.put(f"h_n_{name}", lambda m, change=operation: with_state(change, m, 1), kinds=LAYERS)
    ROWS.put(f"c_n_{name}", lambda m, change=operation: with_state(change, m, 2), kinds=("lstm", "lstm_proj"))
    ROWS.put(f"c_{name}", lambda m, change=operation: with_state(change, m, 1), kinds=("lstmcell",))
    ROWS.put(
        f"h_n_{name}_deep",
        lambda m, change=operation: with_state(change, m, 1),
        kinds=LAYERS,
        num_layers=2,
        bidirectional=True,
    )


@ROWS.add(kinds=LAYERS)
def results_share_no_memory(module):
    """A write to one of output and states shows in no other."""
    with torch.no_grad():
        results = tensors(module(sample(module)))
        for i, result in enumerate(results):
            result.fill_(i)
    return results


@ROWS.add()
def results_share_no_memory_with_states(module):
    with torch.no_grad():
        inputs = [value.detach() for value in leaves(module)]
        for result in tensors(call(module, *inputs)):
            result.zero_()
    return inputs


@ROWS.add()
def states_reset_between_chunks(module):
    """Truncated backpropagation: detached states, of which finished rows are set to zero."""
    x = leaf(module)
    result = module(x)
    loss = total(first(result))
    states = [state.detach() for state in tensors(result)[len(tensors(result)) > 1 and x.dim() == 3 :]]
    for state in states:
        state[..., 0, :] = 0
    loss = loss + total(call(module, x, *states))
    loss.backward()
    return x.grad


@ROWS.add(kinds=LAYERS)
def two_layers_by_hand(module):
    """The second layer reads what was written to the first's output."""
    second = nn.Linear(first(module(sample(module))).shape[-1], 3)
    with torch.no_grad():
        second.weight.fill_(0.5), second.bias.zero_()
    x = leaf(module)
    output = first(module(x)).relu_()
    again = first(module(second(output).relu_()))
    again.mul_(2)
    again.sum().backward()
    return again, x.grad


@ROWS.add(kinds=CELLS)
def a_loop_of_steps(module):
    x, states, losses = leaf(module), [], 0
    for _ in range(3):
        result = tensors(call(module, x, *states))
        states = [state * 1 for state in result]
        states[0].mul_(0.5)
        losses = losses + states[0].sum()
    losses.backward()
    return x.grad


@ROWS.add(dtype=torch.float64)
def double_backward(module):
    x = leaf(module)
    output = first(module(x))
    output.mul_(2)
    (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    return grad, x.grad


@ROWS.add()
def twice_backward(module):
    x = leaf(module)
    output = first(module(x))
    output.mul_(2)
    loss = output.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    return x.grad


@ROWS.add()
def written_between_two_backwards(module):
    x = leaf(module)
    output = first(module(x))
    loss = output.sum()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        output.mul_(2)
    loss.backward()
    return x.grad


# ------------------------------------------------ what the module was given


def given(module, change):
    """`change` gets the arguments and parameters by name after forward."""
    inputs = leaves(module)
    inner = [value * 1 for value in inputs]
    result = call(module, *inner)
    names = {"x": inner[0], "h": inner[1], "c": inner[-1], "w_ih": None, "w_hh": None}
    values = {**names, **{name.removesuffix("_l0"): value for name, value in module.named_parameters()}}
    with torch.no_grad():
        change(values)
    total(result).backward()
    return result, [value.grad for value in inputs]


for name in ("x", "h", "c", "weight_ih", "weight_hh"):
    ROWS[f"given_{name}"] = lambda m, name=name: given(m, lambda values: values[name].mul_(2))
    ROWS[f"given_{name}_slice"] = lambda m, name=name: given(m, lambda values: values[name][0].zero_())
    ROWS[f"given_{name}_data"] = lambda m, name=name: given(m, lambda values: values[name].requires_grad)
for name in ("bias_ih", "bias_hh"):
    # Not of oneDNN's LSTM, which keeps biases for backward though it needs none of them.
    kinds = [kind for kind in KINDS if kind != "lstm"]
    ROWS.put(f"given_{name}", lambda m, name=name: given(m, lambda values: values[name].mul_(2)), kinds=kinds)


@ROWS.add()
def optimizer_step_before_backward(module):
    x = leaf(module)
    loss = total(module(x))
    loss.backward(retain_graph=True)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    loss.backward()


@ROWS.add()
def input_written_before_the_call(module):
    x = leaf(module)
    inner = (x * 1).relu_().mul_(2)
    result = module(inner)
    total(result).backward()
    return result, x.grad


@ROWS.add()
def frozen_input_written(module):
    x = sample(module)
    result = module(x)
    x.mul_(2)
    total(result).backward()


@ROWS.add()
def input_written_under_no_grad_call(module):
    """What was computed without a graph may be written to at will."""
    x = sample(module)
    with torch.no_grad():
        output = first(module(x))
    x.zero_()
    return output.mul_(2)


@ROWS.add()
def inference_tensor_written(module):
    with torch.inference_mode():
        output = first(module(sample(module)))
        output.mul_(2)
    return output.clone()


@ROWS.add()
def inference_tensor_written_outside(module):
    with torch.inference_mode():
        output = first(module(sample(module)))
    output.mul_(2)


@ROWS.parametrize()
def test_row(name, kind):
    ROWS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ROWS)
