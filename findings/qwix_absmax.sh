#!/usr/bin/env bash
# Qwix and AQT, the quantizers of JAX, cannot represent the largest weight: "absmax" is not the end of their range.
#
# One would guess: symmetric 4-bit weights by `absmax` have the scale max|w| / 7, so that the largest weight is exact, weights that are
# multiples of max|w| / 7 stay what they are, and what has been quantized once does not change when it is quantized again.
# What happens: the scale is max|w| / 7.5 (at 8 bits max|w| / 127.5, at 2 bits max|w| / 1.5). AQT turns 7 and −7 into 6.53 and −6.53, Qwix, whose grid
# has −8 as well, into 6.53 and −7.47, as −7.5 is rounded to even: one end shrinks, the other grows. Ternary weights
# −1, 0, 1 become −0.67, 0, 0.67 at 2 bits, and −1.33, 0, 0.67 in Qwix. With every further quantization the largest weight
# loses 7 %: 7, 6.53, 6.10. A network trained on, or repaired for, the usual grid is another network in
# these, without a word. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy==2.4.6 jax==0.10.2 flax==0.12.8 qwix==0.1.8 aqtp==0.9.0
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import aqt.jax.v2.config as aqt
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix

print(*(f"{name} {version(name)}" for name in ("qwix", "aqtp", "jax")))
INPUTS = jnp.eye(8)  # so that the outputs are the weights as they are used


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, use_bias=False)(x)


def weights_of_qwix(weights, bits):
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype=f"int{bits}")
    net = qwix.quantize_model(Linear(), qwix.PtqProvider([rule]))
    shapes = net.init(jax.random.key(0), INPUTS)["params"]
    quantized = qwix.quantize_params({"Dense_0": {"kernel": jnp.asarray(weights)[:, None]}}, shapes)
    return np.asarray(net.apply({"params": quantized}, INPUTS))[:, 0]


def weights_of_aqt(weights, bits):
    product = aqt.dot_general_make(lhs_bits=None, rhs_bits=bits)
    return np.asarray(product(INPUTS, jnp.asarray(weights)[:, None], (((1,), (0,)), ((), ()))))[:, 0]


grid = np.array([-7, -3, 0, 1, 2, 4, 5, 7], np.float32)
ternary = np.array([-1, -1, 0, 0, 0, 1, 1, 1], np.float32)
for name, quantize, low in ("AQT", weights_of_aqt, -7), ("Qwix", weights_of_qwix, -8):
    once = quantize(grid, 4)
    twice = quantize(once[[5, 5, 2, 3, 4, 5, 6, 7]], 4)  # its largest is positive
    print(name, "4 bits:", *grid, "->", *once.round(2))
    print(name, "largest weight, quantized again:", grid[-1], once[-1].round(2), twice[-1].round(2))
    print(name, "2 bits:", *ternary, "->", *quantize(ternary, 2).round(2))
    assert np.allclose(once[[0, -1]], np.array([low, 7]) * 7 / 7.5, atol=1e-5), "4 bits have another grid now"
    assert np.allclose(twice[-1], 7 * (7 / 7.5) ** 2, atol=1e-4)
    assert np.allclose(quantize(ternary, 2)[-1], 2 / 3, atol=1e-6), "2 bits have another grid now"
PYTHON
echo "as described"
