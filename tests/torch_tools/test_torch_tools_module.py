"""torch.nn.Module's hooks and methods, copies and pickles."""

import copy
import io
import pickle
import warnings
import weakref

import torch
from support.torch_tools import (
    Model,
    Rows,
    assert_plant_is_caught,
    call,
    first,
    leaf,
    leaves,
    sample,
    train,
    weight,
    weight_name,
)
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    gradients,
    tensors,
    total,
)
from torch import nn

# ------------------------------------------------ hooks

HOOKS = Rows()


def doubled(result):
    if isinstance(result, tuple):
        return tuple(doubled(one) for one in result)
    return None if result is None else result * 2


def hooked(register):
    """The outcome with hooks, and without them after they are removed."""

    def program(module):
        seen = []
        handles = register(module, seen)
        inputs = leaves(module)
        result = call(module, *inputs)
        total(result).backward()
        for handle in handles if isinstance(handles, (list, tuple)) else [handles]:
            handle.remove()
        return result, [value.grad for value in inputs], seen, gradients(module), module(sample(module))

    return program


HOOKS["forward"] = hooked(lambda m, seen: m.register_forward_hook(lambda m, args, result: doubled(result)))
HOOKS["forward_sees"] = hooked(lambda m, seen: m.register_forward_hook(lambda m, args, result: seen.append(result)))
HOOKS["forward_kwargs"] = hooked(
    lambda m, seen: m.register_forward_hook(lambda m, args, kwargs, result: seen.append(len(args)), with_kwargs=True)
)
HOOKS["forward_prepended"] = hooked(
    lambda m, seen: [
        m.register_forward_hook(lambda m, args, result: seen.append(1)),
        m.register_forward_hook(lambda m, args, result: seen.append(2), prepend=True),
    ]
)
HOOKS["pre"] = hooked(lambda m, seen: m.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])))
HOOKS["pre_one_value"] = hooked(lambda m, seen: m.register_forward_pre_hook(lambda m, args: args[0] * 2))
HOOKS["pre_drops_states"] = hooked(lambda m, seen: m.register_forward_pre_hook(lambda m, args: (args[0], None)))
HOOKS["pre_kwargs"] = hooked(
    lambda m, seen: m.register_forward_pre_hook(
        lambda m, args, kwargs: ((), {"input": args[0] * 2, "hx": args[1]}), with_kwargs=True
    )
)
HOOKS["backward"] = hooked(
    lambda m, seen: m.register_full_backward_hook(lambda m, before, after: seen.extend([before[0], *after]))
)
HOOKS["backward_changes"] = hooked(
    lambda m, seen: m.register_full_backward_hook(lambda m, before, after: tuple(doubled(g) for g in before))
)
HOOKS["backward_pre"] = hooked(lambda m, seen: m.register_full_backward_pre_hook(lambda m, grads: doubled(grads)))
HOOKS["backward_pre_sees"] = hooked(lambda m, seen: m.register_full_backward_pre_hook(lambda m, g: seen.extend(g)))
HOOKS["weight"] = hooked(lambda m, seen: weight(m).register_hook(lambda grad: grad * 3))
HOOKS["weight_accumulated"] = hooked(
    lambda m, seen: weight(m).register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
)
HOOKS["global_forward"] = hooked(
    lambda m, seen: nn.modules.module.register_module_forward_hook(lambda m, args, result: doubled(result))
)
HOOKS["global_pre"] = hooked(
    lambda m, seen: nn.modules.module.register_module_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
)
HOOKS["global_backward"] = hooked(
    lambda m, seen: nn.modules.module.register_module_full_backward_hook(lambda m, before, after: seen.extend(after))
)


@HOOKS.add()
def legacy_backward(module):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.register_backward_hook(lambda m, before, after: seen.append(len(seen)))
        return train(module), seen


@HOOKS.add()
def always_called(module):
    seen = []
    module.register_forward_hook(lambda m, args, result: seen.append(result is None), always_call=True)
    try:
        module(sample(module)[..., :2])
    except (RuntimeError, ValueError):
        pass
    return seen, train(module)


@HOOKS.add()
def hook_that_raises(module):
    def hook(m, args, result):
        raise ZeroDivisionError

    module.register_forward_hook(hook)
    return module(sample(module))


@HOOKS.add()
def backward_hook_that_raises(module):
    def hook(m, before, after):
        raise ZeroDivisionError

    module.register_full_backward_hook(hook)
    return train(module)


@HOOKS.add()
def hooks_of_the_state_dict(module):
    module._register_state_dict_hook(lambda m, state, prefix, meta: state.update(extra=torch.zeros(1)))
    module.register_state_dict_pre_hook(lambda m, prefix, keep: None)
    module.register_load_state_dict_pre_hook(lambda m, state, *args: state.pop("extra", None))
    module.register_load_state_dict_post_hook(lambda m, keys: keys.missing_keys.clear())
    state = module.state_dict()
    del state[weight_name(module)]
    return state, [list(keys) for keys in module.load_state_dict(state)], train(module)


# ------------------------------------------------ methods

METHODS = Rows()


def after(change):
    """Training after `change(module)`."""

    def program(module):
        found = change(module)
        return train(found if isinstance(found, nn.Module) else module), module.training

    return program


METHODS["double"] = after(lambda m: m.double())
METHODS["bfloat16"] = lambda m: tensors(m.bfloat16()(sample(m)))
METHODS["float_after_half"] = after(lambda m: m.half().float())
METHODS["type"] = after(lambda m: m.type(torch.float64))
METHODS["to_dtype"] = after(lambda m: m.to(torch.float64))
METHODS["to_memory_format"] = after(lambda m: m.to(memory_format=torch.contiguous_format))
METHODS["cpu"] = after(lambda m: m.cpu())
METHODS["cuda"] = after(lambda m: m.cuda() if torch.cuda.is_available() else m)
METHODS["eval"] = after(lambda m: m.eval())
METHODS["train_false"] = after(lambda m: m.train(False))
METHODS["share_memory"] = after(lambda m: m.share_memory())
METHODS["requires_grad_false"] = after(lambda m: m.requires_grad_(False))
METHODS["requires_grad_one"] = after(lambda m: weight(m).requires_grad_(False))
METHODS["apply"] = after(lambda m: m.apply(lambda one: [p.data.mul_(0.5) for p in one.parameters()]))
METHODS["_apply"] = after(lambda m: m._apply(lambda t: t.double()))
METHODS["deepcopy"] = after(copy.deepcopy)
METHODS["copy"] = after(copy.copy)
METHODS["pickle"] = after(lambda m: pickle.loads(pickle.dumps(m)))
METHODS["register_buffer"] = after(lambda m: m.register_buffer("extra", torch.zeros(2)))
METHODS["register_parameter"] = after(lambda m: m.register_parameter("extra", nn.Parameter(torch.zeros(2))))
METHODS["add_module"] = after(lambda m: m.add_module("extra", nn.Linear(2, 2)))
METHODS["extra_repr"] = lambda m: (m.extra_repr(), repr(m), sample(m))
METHODS["named_modules"] = lambda m: ([name for name, _ in Model(m).named_modules()], sample(m))
METHODS["get_parameter"] = lambda m: (m.get_parameter(weight_name(m)), m.get_submodule("") is m)
METHODS["dir"] = lambda m: ([name for name in dir(m) if name[0] != "_" and name != "lengths"], sample(m))
METHODS["state_dict"] = lambda m: (m.state_dict(prefix="p."), m.state_dict(keep_vars=True))
METHODS["named_parameters"] = lambda m: dict(m.named_parameters())
METHODS["call_dunder"] = lambda m: m.__call__(sample(m))
METHODS["wrapped_call"] = lambda m: m._wrapped_call_impl(sample(m))
METHODS["keyword_arguments"] = lambda m: m(input=sample(m), hx=None)
METHODS["unknown_keyword"] = lambda m: m(sample(m), other=1)
METHODS["no_argument"] = lambda m: m()
METHODS["too_many_arguments"] = lambda m: m(sample(m), None, None)
METHODS["list_as_input"] = lambda m: m(sample(m).tolist())
METHODS["numpy_as_input"] = lambda m: m(sample(m).numpy())
METHODS["none_as_input"] = lambda m: m(None)
METHODS["integers_as_input"] = lambda m: m(sample(m).long())
METHODS["parameter_as_input"] = lambda m: m(nn.Parameter(sample(m)))
METHODS["sparse_input"] = lambda m: m(sample(m).to_sparse())
METHODS["meta_input"] = lambda m: m(sample(m).to("meta"))
METHODS["complex_input"] = lambda m: m(sample(m).to(torch.complex64))
METHODS["double_input"] = lambda m: m(sample(m).double())
METHODS["half_input"] = lambda m: m(sample(m).half())
METHODS["half_states"] = lambda m: call(m, sample(m), *(v.detach().half() for v in leaves(m)[1:]))
METHODS["double_states"] = lambda m: call(m, sample(m), *(v.detach().double() for v in leaves(m)[1:]))
METHODS["meta_states"] = lambda m: call(m, sample(m), *(v.detach().to("meta") for v in leaves(m)[1:]))


@METHODS.add()
def half_values(module):
    return tensors(module.half()(sample(module)))


@METHODS.add()
def zero_grad(module):
    train(module)
    module.zero_grad(set_to_none=True)
    none = [p.grad is None for p in module.parameters()]
    train(module)
    module.zero_grad(set_to_none=False)
    return none, gradients(module), train(module)


@METHODS.add()
def gradients_accumulate(module):
    return train(module), train(module, leaf(module))


@METHODS.add()
def to_empty(module):
    state = copy.deepcopy(module.state_dict())
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    return train(module)


@METHODS.add()
def load_state_dict_assign(module):
    state = {name: value * 0.5 for name, value in module.state_dict().items()}
    keys = module.load_state_dict(state, assign=True)
    return list(keys), train(module), [weight(module) is state[weight_name(module)]]


@METHODS.add()
def load_state_dict_wrong_shape(module):
    module.load_state_dict({name: value[:1] for name, value in module.state_dict().items()})


@METHODS.add()
def load_state_dict_not_strict(module):
    return list(module.load_state_dict({"other": torch.zeros(1)}, strict=False)), train(module)


def swapped(run):
    def program(module):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            kept = weight(module)
            run(module)
            return train(module), kept is weight(module)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return program


METHODS["swapped_on_conversion"] = swapped(lambda m: m.double())
METHODS["swapped_to_empty"] = swapped(lambda m: m.to("meta"))
METHODS["swapped_on_load"] = swapped(lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}))


@METHODS.add()
def overwritten_on_conversion(module):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        module.double()
        return train(module)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@METHODS.add()
def tensors_swapped(module):
    """torch.utils.swap_tensors: the parameter object stays, all that it is changes."""
    torch.utils.swap_tensors(weight(module), nn.Parameter(weight(module).detach() * 0.5))
    return train(module)


@METHODS.add()
def deepcopy_after_a_forward(module):
    train(module)
    other = copy.deepcopy(module)
    other.zero_grad()
    return train(other), gradients(other)


@METHODS.add()
def deepcopy_of_a_result(module):
    with torch.no_grad():
        return copy.deepcopy(module(sample(module)))


@METHODS.add()
def pickle_of_a_result(module):
    return pickle.loads(pickle.dumps([result.detach() for result in tensors(module(sample(module)))]))


@METHODS.add()
def copies_share_weights(module):
    other = copy.copy(module)
    with torch.no_grad():
        weight(module).mul_(0.5)
    return train(other)


@METHODS.add()
def a_copy_gets_its_own_weight(module):
    other = copy.copy(module)
    setattr(other, weight_name(other), nn.Parameter(weight(other).detach() * 0.5))
    return train(other), module(sample(module))


@METHODS.add()
def saved_state_loads_with_weights_only(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer, weights_only=True))
    return train(module)


@METHODS.add()
def saved_module_needs_a_safe_class(module):
    """The class must be named as safe; torch.nn's LSTM must too."""
    buffer = io.BytesIO()
    torch.save(module, buffer)
    for safe in ([], [type(module), set, weakref.ref]):
        buffer.seek(0)
        with torch.serialization.safe_globals(safe):
            try:
                torch.load(buffer, weights_only=True)
            except pickle.UnpicklingError:
                continue
            return True, sample(module)
    return False, sample(module)


@METHODS.add()
def mmap_loaded(module):
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        torch.save(module.state_dict(), file.name)
        module.load_state_dict(torch.load(file.name, mmap=True, weights_only=True), assign=True)
        return first(module(sample(module))).detach()


@METHODS.add()
def setstate_of_an_old_pickle(module):
    state = copy.deepcopy(module.__getstate__() if hasattr(module, "__getstate__") else vars(module))
    other = type(module).__new__(type(module))
    other.__setstate__(state)
    return train(other)


@HOOKS.parametrize()
def test_hooks(name, kind):
    HOOKS.check(name, kind)


@METHODS.parametrize()
def test_methods(name, kind):
    METHODS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(METHODS)
