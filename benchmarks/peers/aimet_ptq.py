"""Quantize the network of a job file with AIMET; run by benchmarks/toolkits.py.

Quantized are the image, the output of each ReLU and that of the pooling, with a zero point, and
the weights symmetrically. The logits, which the toolkit would quantize as well, stay in float, so
that it covers what the others cover.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common.defs import QuantScheme
from aimet_torch.cross_layer_equalization import CrossLayerScaling
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.seq_mse import apply_seq_mse
from plain_network import run_job
from torch import Tensor, nn
from torch.utils.data import DataLoader

PERCENTILE = 99.99
SCHEMES = {
    "min_max": QuantScheme.min_max,
    "tf_enhanced": QuantScheme.post_training_tf_enhanced,
    "percentile": QuantScheme.post_training_percentile,
}


def settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of each way to quantize a row, by name."""
    if row["learned"]:
        return {
            f"adaround, {scheme}, {steps} steps": {"scheme": scheme, "steps": steps}
            for scheme, steps in [("tf_enhanced", 2000), ("min_max", 2000)]
        }
    ways: dict[str, Any] = {scheme: {"scheme": scheme} for scheme in SCHEMES}
    if not row["act_bits"] and not row["equalized"]:  # 90 s each
        ways["min_max, sequential MSE"] = {"scheme": "min_max", "sequential": True}
    return ways


def config(per_channel: bool) -> dict[str, Any]:
    """Return the settings of quantizers as the toolkit reads them from a file."""
    layer = {"per_channel_quantization": str(per_channel)}
    return {
        "defaults": {
            "ops": {"is_output_quantized": "True"},
            "params": {"is_quantized": "True", "is_symmetric": "True"},
            "strict_symmetric": "False",  # this version supports nothing else
            "per_channel_quantization": "False",
        },
        "params": {"bias": {"is_quantized": "False"}},
        "op_type": {"Conv": layer, "Gemm": layer},
        "supergroups": [{"op_list": ["Conv", "Relu"]}, {"op_list": ["Gemm", "Relu"]}],
        "model_input": {"is_input_quantized": "True"},
        "model_output": {},
    }


def batches(images: Tensor, batch_size: int) -> DataLoader:
    """Return batches of images."""
    return DataLoader(images, batch_size)


def quantize(
    net: nn.Module, row: Mapping[str, Any], options: Mapping[str, Any], job: Mapping[str, Any]
) -> nn.Module:
    """Return the quantized network."""
    images = job["calibration_images"]
    dummy = images[:1]
    scheme = SCHEMES[options["scheme"]]
    folder = tempfile.TemporaryDirectory()
    with contextlib.redirect_stdout(sys.stderr), folder:
        path = Path(folder.name, "config.json")
        path.write_text(json.dumps(config(row["per_channel"])))
        if row["equalized"]:
            CrossLayerScaling.scale_model(net, dummy_input=dummy)
        if row["learned"]:
            loader = batches(job["rounding_images"], 32)
            net = Adaround.apply_adaround(
                net,
                dummy,
                AdaroundParameters(loader, len(loader), options["steps"]),
                path=folder.name,
                filename_prefix="rounded",
                default_param_bw=row["bits"],
                default_quant_scheme=scheme,
                default_config_file=str(path),
            )
        sim = QuantizationSimModel(
            net,
            dummy,
            scheme,
            default_output_bw=row["act_bits"] or 8,
            default_param_bw=row["bits"],
            config_file=str(path),
        )
        if options["scheme"] == "percentile":
            sim.set_percentile_value(PERCENTILE)
        if row["learned"]:
            sim.set_and_freeze_param_encodings(str(Path(folder.name, "rounded.encodings")))
        keep_in_float(sim.model, all_values=not row["act_bits"])
        if options.get("sequential"):
            apply_seq_mse(sim, batches(images, 64))

        @torch.no_grad()
        def run(model: nn.Module) -> None:
            for x in images.split(64):
                model(x)

        sim.compute_encodings(run)
    return sim.model.eval()


def keep_in_float(net: nn.Module, all_values: bool) -> None:
    """Remove the quantizer of the logits or, with `all_values`, those of all inputs and outputs."""
    *_, last = [each for each in net.modules() if hasattr(each, "output_quantizers")]
    last.output_quantizers[0] = None
    if not all_values:
        return
    for module in net.modules():
        for quantizers in ("input_quantizers", "output_quantizers"):
            for i in range(len(getattr(module, quantizers, ()))):
                getattr(module, quantizers)[i] = None


if __name__ == "__main__":
    run_job(["aimet-torch", "torch"], settings, quantize)
