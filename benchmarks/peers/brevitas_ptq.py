"""Quantize the network of a job file with Brevitas; run by benchmarks/toolkits.py.

Inputs are quantized by the toolkit's `fx` backend: the image, and the output of each ReLU without a
sign; weights alone, and learned rounding, by its `layerwise` one. No layer keeps other bits. What
enters the last layer, the mean over pixels, is quantized with a sign, though never negative; with
"pooled unsigned" a second ReLU behind the pooling makes it unsigned. The logits, which the toolkit
would quantize as well, stay in float, so that it covers what the others cover.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from brevitas.graph.quantize import preprocess_for_quantize
from brevitas.nn import QuantIdentity
from brevitas_examples.imagenet_classification.ptq import learned_round_utils, ptq_common
from plain_network import run_job
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

EQUALIZING_ITERATIONS = 20  # the default of the toolkit's own command
PERCENTILE = 99.999  # the same
# Learned rounding: (form, loss, learning rate, images a step, steps a layer)
LEARNED = {
    "lr 0.01, 32 images": ("hard_sigmoid", "regularised_mse", 1e-2, 32, 1000),
    "defaults": ("hard_sigmoid", "regularised_mse", 1e-3, 1, 1000),
}


class Flatten(nn.Module):
    """`torch.flatten`: behind `nn.Flatten`, the toolkit quantizes once more, with a sign."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, 1, 1) to (B, C)."""
        return torch.flatten(x, 1)


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of each way to quantize a row, by name."""
    if row["learned"]:
        return {f"learned round, {name}": {"learned": how} for name, how in LEARNED.items()}
    ways = {}
    for weights, corrects in product(["stats", "mse"], [False, True]):
        name = f"weights {weights}{', biases corrected' if corrects else ''}"
        ways[name] = {"weights": weights, "corrects": corrects}
    if row["act_bits"]:
        unsigned = {"weights": "mse", "corrects": True, "unsigned": True}
        name = "weights mse, biases corrected, pooled unsigned"
        ways[name] = unsigned
        ways[f"{name}, inputs mse"] = {**unsigned, "inputs": "mse"}  # 45 s each
    return ways


def loader(images: Tensor, batch_size: int) -> DataLoader:
    """Return batches of images, with labels that nothing reads."""
    labels = torch.zeros(len(images), dtype=torch.long)
    return DataLoader(TensorDataset(images, labels), batch_size)


def quantize(
    net: nn.Module, row: Mapping[str, Any], options: Mapping[str, Any], job: Mapping[str, Any]
) -> nn.Module:
    """Return the quantized network."""
    images = job["calibration_images"]
    iterations = EQUALIZING_ITERATIONS if row["equalized"] else 0
    for name, module in [*net.named_children()]:
        if isinstance(module, nn.AdaptiveAvgPool2d) and options.get("unsigned"):
            setattr(net, name, nn.Sequential(module, nn.ReLU()))
        elif isinstance(module, nn.Flatten):
            setattr(net, name, Flatten())
    net = preprocess_for_quantize(net, equalize_iters=iterations, merge_bn=False)
    granularity = "per_channel" if row["per_channel"] else "per_tensor"
    with contextlib.redirect_stdout(sys.stderr):
        net = ptq_common.quantize_model(
            net,
            backend="fx" if row["act_bits"] else "layerwise",
            weight_bit_width=row["bits"],
            act_bit_width=row["act_bits"],
            bias_bit_width=None,
            weight_quant_granularity=granularity,
            act_quant_percentile=PERCENTILE,
            act_quant_type="sym",
            scale_factor_type="float_scale",
            quant_format="int",
            layerwise_first_last_bit_width=row["bits"],
            weight_param_method=options.get("weights", "stats"),
            act_param_method=options.get("inputs", "stats"),
        )
        if row["act_bits"]:
            keep_logits_in_float(net)
        with torch.no_grad():
            net(images[:64])
        if row["act_bits"]:
            ptq_common.calibrate(loader(images, 64), net)
        if row["learned"]:
            learn(net, job["rounding_images"], *options["learned"])
        elif options["corrects"]:
            ptq_common.apply_bias_correction(loader(images, 64), net)
    return net.eval()


def keep_logits_in_float(net: fx.GraphModule) -> None:
    """Remove the quantizer that the `fx` backend puts behind the last layer."""
    [output] = [node for node in net.graph.nodes if node.op == "output"]
    last = output.args[0]
    if not isinstance(net.get_submodule(last.target), QuantIdentity):
        raise TypeError(f"the network ends in {last.target}, which is no quantizer")
    last.replace_all_uses_with(last.args[0])
    net.graph.erase_node(last)
    net.recompile()


def learn(
    net: nn.Module, images: Tensor, form: str, loss: str, rate: float, n_images: int, n_steps: int
) -> None:
    """Learn the rounding of each layer, in float32."""
    args = argparse.Namespace(
        learned_round=form,
        learned_round_loss=loss,
        learned_round_mode="layerwise",
        learned_round_lr=rate,
        learned_round_lr_scheduler=None,
        learned_round_batch_size=n_images,
        learned_round_iters=n_steps,
    )
    with in_float32():
        learned_round_utils.apply_learned_round(net, loader(images, 64), args)


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Context manager in which rounding is learned without half precision, slow on processors."""
    original = learned_round_utils.parse_args_to_dataclass

    def parse(args: argparse.Namespace) -> Any:
        config = original(args)
        config.training_args.use_amp = False
        return config

    learned_round_utils.parse_args_to_dataclass = parse
    try:
        yield
    finally:
        learned_round_utils.parse_args_to_dataclass = original


if __name__ == "__main__":
    run_job(["brevitas", "torch"], settings, quantize)
