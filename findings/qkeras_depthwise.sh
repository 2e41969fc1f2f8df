#!/usr/bin/env bash
# QKeras and Larq: the automatic scale, one for each channel elsewhere, is one for all channels of a depthwise layer.
#
# One would guess: `quantized_bits(4, 0, 1, alpha="auto")` computes a scale for each channel of a QDepthwiseConv2D as it does for
# a QConv2D, and so does Larq's magnitude_aware_sign, as each channel is a filter of its own there.
# What happens: what has a scale of its own is the kernel's last axis. In a depthwise kernel that is the multiplier, which is 1;
# the channels are on the axis before. So there is one scale, and the loudest channel sets it. Of eight channels, each
# half as loud as the one before, the last three get no code but 0 with 4 bits, and the layer answers 0 there; with
# binary weights all get equally loud, the last 28 times as loud as it was. QSeparableConv2D does the same. The eight
# filters in a QConv2D are right, each within 10 %, and so is the depthwise layer with `scale_axis=2`, but nothing says
# that it needs that. Depthwise layers are those whose channels differ most, with batch norms folded in above all.
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet tensorflow-cpu==2.15.1 numpy==1.26.4 scipy==1.17.1 networkx==3.6.1 \
    tqdm==4.70.1 pyparsing==3.1.4 terminaltables==3.1.10 dm-tree==0.1.10
"$folder/venv/bin/python" -m pip install --quiet --no-deps qkeras==0.9.0 larq==0.14.0 \
    tensorflow-model-optimization==0.8.1 tf-keras==2.15.1 keras-tuner==1.4.8 kt-legacy==1.0.5
cd "$folder"
TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" -W ignore - 2>said.log <<'PYTHON' || { cat said.log >&2; exit 1; }
from importlib.metadata import version

import larq
import numpy as np
import qkeras
import tensorflow as tf

print(*(f"{name} {version(name)}" for name in ("qkeras", "larq", "tensorflow-cpu", "numpy")))
CHANNELS, BITS = 8, 4
rng = np.random.default_rng(0)
factors = 0.5 ** np.arange(CHANNELS)
kernel = (rng.normal(size=(3, 3, CHANNELS, 1)) * factors[:, None]).astype(np.float32)
images = rng.normal(size=(16, 12, 12, CHANNELS)).astype(np.float32)


def rounded(weights, axis):
    """The weights on a symmetric grid of 4 bits, one for each place along the axes that are not named."""
    scale = np.abs(weights).max(axis, keepdims=True) / (2 ** (BITS - 1) - 1)
    return np.round(weights / scale) * scale


def depthwise(weights):
    return tf.nn.depthwise_conv2d(images, weights, [1] * 4, "VALID").numpy()


def errors(answers):
    """How far each channel's answers are off, of their size."""
    exact = depthwise(kernel)
    return np.sqrt(np.square(answers - exact).mean((0, 1, 2)) / np.square(exact).mean((0, 1, 2)))


def layer(kind, weights, inputs, **options):
    """The answers of one of QKeras' layers with these weights."""
    built = kind(use_bias=False, **options)
    built.build(inputs.shape)
    built.set_weights([weights])
    return built(inputs).numpy()


def show(title, answers):
    print(f"{title:34}", *(f"{100 * error:6.1f} %" for error in errors(answers)))


auto = {"bits": BITS, "integer": 0, "symmetric": 1, "alpha": "auto"}
by_channel, by_layer = depthwise(rounded(kernel, (0, 1, 3))), depthwise(rounded(kernel, (0, 1, 2, 3)))
together = kernel.transpose(0, 1, 3, 2)  # the eight filters of a convolution of one channel
options = {"filters": CHANNELS, "kernel_size": 3, "kernel_quantizer": qkeras.quantized_bits(**auto)}
plain = np.concatenate(
    [layer(qkeras.QConv2D, together, images[..., [c]], **options)[..., [c]] for c in range(CHANNELS)], -1
)
found = {}
for axis in (None, 2):
    quantizer = qkeras.quantized_bits(**auto, scale_axis=axis)
    found[axis] = layer(qkeras.QDepthwiseConv2D, kernel, images, kernel_size=3, depthwise_quantizer=quantizer)
show("NumPy, a scale for each channel", by_channel)
show("NumPy, a scale for the layer", by_layer)
show("QConv2D of all eight filters", plain)
show("QDepthwiseConv2D", found[None])
show("QDepthwiseConv2D, scale_axis=2", found[2])
assert np.allclose(plain, by_channel, atol=1e-5)
assert np.allclose(found[2], by_channel, atol=1e-5), "scale_axis does something else now"
assert np.allclose(found[None], by_layer, atol=1e-5), "a depthwise layer has another scale now"
silent = [c for c in range(CHANNELS) if not found[None][..., c].any()]
print("channels that answer 0 to everything:", *silent)
assert silent == [5, 6, 7] and errors(by_channel).max() < 0.2

separable = qkeras.QSeparableConv2D(
    4, 3, depthwise_quantizer=qkeras.quantized_bits(**auto), pointwise_quantizer=qkeras.quantized_bits(**auto)
)
separable(images)
shapes = [tuple(q.scale.shape) for q in (separable.depthwise_quantizer_internal, separable.pointwise_quantizer_internal)]
print("QSeparableConv2D's scales:", *shapes)
assert shapes == [(1, 1, 1, 1), (1, 1, 1, 4)]

mean = np.abs(kernel).mean((0, 1, 3))
for title, answers in (
    ("QKeras binary(alpha='auto')", qkeras.binary(alpha="auto")(kernel).numpy()),
    ("Larq magnitude_aware_sign", larq.quantizers.MagnitudeAwareSign()(kernel).numpy()),
):
    sizes = np.abs(answers).mean((0, 1, 3))
    print(f"{title:27} sizes of the channels, of their mean:", *(f"{ratio:.2g}" for ratio in sizes / mean))
    assert np.ptp(sizes) < 1e-6 * sizes.max() and sizes[-1] > 10 * mean[-1]
PYTHON
if grep --quiet --ignore-case --extended-regexp "scale|depthwise|axis" "$folder/said.log"; then
    cat "$folder/said.log" >&2
    echo "it says something now" >&2
    exit 1
fi
echo "as described"
