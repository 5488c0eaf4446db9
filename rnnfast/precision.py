"""How float32 products are made on a GPU, where tensor cores round their operands to TF32 (10 bits of mantissa)."""

import os

import torch

PRODUCTS = ("tf32", "tf32x3", "ieee")


def float32_products(device: torch.device) -> str:
    """One of PRODUCTS, for the recurrent product of float32 layers; "tf32x3" is three TF32 products, nearly exact.

    On a GPU this follows torch's own switch for recurrent layers, torch.backends.cudnn.rnn.fp32_precision: TF32 unless
    changed. On CPU tensors (interpreter, emulator) products are exact, as torch's are there. RNNFAST_FLOAT32_PRODUCTS
    in the environment overrules both; raises ValueError for a word that is none of the three. The products with the
    input and those of the weights' gradients are torch's own and follow its switch for those,
    torch.backends.cuda.matmul.fp32_precision.
    """
    asked = os.environ.get("RNNFAST_FLOAT32_PRODUCTS")
    if not asked and device.type != "cuda":
        return "ieee"
    if not asked:
        return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "ieee"
    if asked not in PRODUCTS:
        raise ValueError(f"RNNFAST_FLOAT32_PRODUCTS: expected one of {', '.join(PRODUCTS)}, got {asked!r}")
    return asked
