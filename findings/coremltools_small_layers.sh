#!/usr/bin/env bash
# coremltools leaves every layer of 2,048 weights or fewer in float32, so that a small network is hardly quantized at all.
#
# One would guess: linear_quantize_weights with a global configuration of 4 bits quantizes the weights of all convolutions, or
# names those that it leaves.
# What happens: a weight takes part if it has more than 2,048 elements. A ResNet20 of a quarter of the width, whose first
# seven convolutions have 108 and 144 weights each, keeps all of those and more in float32, and the tool says nothing; with `weight_threshold=0` all are
# quantized. An accuracy at 4 bits that was measured so is that of a network with its most sensitive layers in float. Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.7.0 coremltools==9.0 "numpy<2.4"
cd "$folder"
"$folder/venv/bin/python" - 2>said.log <<'PYTHON' || { cat said.log >&2; exit 1; }
import coremltools as ct
import coremltools.optimize.coreml as optimize
import torch
from torch import nn

print("torch", torch.__version__, "coremltools", ct.__version__)
WIDTHS = [3, 4, 4, 8, 16, 32]  # the convolutions have 108, 144, 288, 1,152 and 4,608 weights
torch.manual_seed(0)
layers = [nn.Conv2d(n, m, 3, padding=1) for n, m in zip(WIDTHS, WIDTHS[1:])]
network = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
images = torch.randn(1, 3, 16, 16)
model = ct.convert(
    torch.jit.trace(network, images),
    inputs=[ct.TensorType(shape=images.shape)],
    convert_to="mlprogram",
    minimum_deployment_target=ct.target.iOS18,
    skip_model_load=True,
)


def quantized_sizes(**options):
    """How many weights each quantized tensor has."""
    settings = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int4", **options)
    quantized = optimize.linear_quantize_weights(model, optimize.OptimizationConfig(global_config=settings))
    operations = quantized._mil_program.functions["main"].operations
    return [op.inputs["data"].val.size for op in operations if op.op_type == "constexpr_blockwise_shift_scale"]


sizes = [layer.weight.numel() for layer in layers]
by_default, with_zero = quantized_sizes(), quantized_sizes(weight_threshold=0)
print(f"weights of the convolutions: {sizes}")
print(f"quantized by default: {by_default}; with weight_threshold=0: {with_zero}")
assert by_default == [size for size in sizes if size > 2048], "other layers are quantized now"
assert sorted(with_zero) == sorted(sizes), "weight_threshold=0 does not quantize all of them"
PYTHON
if grep --quiet --ignore-case --extended-regexp "threshold|not quantized|skipping weight" "$folder/said.log"; then
    cat "$folder/said.log" >&2
    echo "it says something now" >&2
    exit 1
fi
echo "as described"
