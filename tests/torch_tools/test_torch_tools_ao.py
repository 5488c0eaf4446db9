"""torch.ao, quantization and sparsity, of models that hold a module."""

import copy
import warnings

import torch
from support.torch_tools import Model, Rows, assert_plant_is_caught, sample, train, weight, weight_name
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    total,
)
from torch import ao, nn
from torch.ao.ns import _numeric_suite

AO = Rows()
ENGINES = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]


def quietly(run):
    def program(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(module)

    return program


def observed(module):
    """Eager-mode quantization's prepare on a model that holds a layer: the layer itself gets no observer."""
    model = Model(module).eval()
    model.after.qconfig = ao.quantization.default_qconfig
    prepared = ao.quantization.prepare(model)
    return prepared(sample(module)), [name for name, _ in prepared.named_modules()]


def qat(module):
    model = Model(module).train()
    model.after.qconfig = ao.quantization.default_qat_qconfig
    prepared = ao.quantization.prepare_qat(model)
    result = prepared(sample(module))
    total(result).backward()
    return result


def fused(module):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), module).eval()
    torch.manual_seed(0)
    model[0].reset_parameters()
    return ao.quantization.fuse_modules(model, ["0", "1"])(sample(module))


def sparsified(module):
    sparsifier = ao.pruning.WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(nn.ModuleList([module]), [{"tensor_fqn": f"0.{weight_name(module)}"}])
    sparsifier.step()
    result = train(module)
    sparsifier.squash_mask()
    return result, module(sample(module))


def fake_sparse(module):
    mask = (weight(module) > 0).to(weight(module).dtype)
    nn.utils.parametrize.register_parametrization(module, weight_name(module), ao.pruning.FakeSparsity(mask))
    return train(module)


def fake_quantized(module):
    quantize = ao.quantization.FakeQuantize()
    nn.utils.parametrize.register_parametrization(module, weight_name(module), quantize, unsafe=True)
    return train(module)


def quant_stubs(module):
    """Stubs around the layer do nothing before convert."""
    return nn.Sequential(ao.quantization.QuantStub(), module)(sample(module))


def dynamic(module):
    """The Linear beside the layer is quantized, and the layer is not: torch compares exact types, see the docs."""
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, ENGINES[0]
    try:
        model = ao.quantization.quantize_dynamic(Model(module).eval(), {nn.Linear}, torch.qint8)
        return model(sample(module))
    finally:
        torch.backends.quantized.engine = before


def dynamic_no_type_given(module):
    model = ao.quantization.quantize_dynamic(nn.Sequential(nn.Identity(), module), {nn.Linear}, torch.qint8)
    return model(sample(module))


def float16_weights(module):
    return ao.quantization.quantize_dynamic(nn.Sequential(nn.Identity(), module), {nn.Linear}, torch.float16)(
        sample(module)
    )


def weights_compared(module):
    other = copy.deepcopy(module)
    found = _numeric_suite.compare_weights(Model(module).state_dict(), Model(other).state_dict())
    return {name: pair["float"] for name, pair in found.items()} or sample(module)


AO["prepare"] = quietly(observed)
AO["prepare_qat"] = quietly(qat)
AO["fuse_modules"] = quietly(fused)
AO["sparsifier"] = quietly(sparsified)
AO["fake_sparsity"] = quietly(fake_sparse)
AO["fake_quantize"] = quietly(fake_quantized)
AO["quant_stub"] = quietly(quant_stubs)
if ENGINES:
    AO["quantize_dynamic_neighbour"] = quietly(dynamic)
AO["quantize_dynamic_other_types"] = quietly(dynamic_no_type_given)
AO["quantize_dynamic_float16"] = quietly(float16_weights)
AO["compare_weights"] = quietly(weights_compared)


@AO.add()
def get_default_qconfig_propagates(module):
    model = Model(module)
    model.qconfig = ao.quantization.default_dynamic_qconfig
    ao.quantization.propagate_qconfig_(model)
    return hasattr(model.module, "qconfig"), train(module)


@AO.parametrize()
def test_ao(name, kind):
    AO.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(AO)
