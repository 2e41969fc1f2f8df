"""Print what bias correction on float inputs, and the peers' equalizing, give on our grids.

From the root of the repository: python results/toolkits/why.py --data_dir DIR [--brevitas PYTHON]
[--aimet PYTHON]. Its output is why.log. It replaces one function of ours for the time being.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import toolkits  # noqa: E402

from engine.networks.graph import copy_graph, layers, set_constant  # noqa: E402

WEIGHTS = ROOT / "weights" / "control.pt"
CASES = [
    "--bits 4 --step_size full",
    "--bits 4 --equalize --step_size full",
    "--bits 3 --step_size full",
    "--bits 3 --schemes clip",
    "--bits 3 --schemes clip --clip_p 2",
    "--bits 3 --schemes clip --clip_p 3",
    "--bits 3 --equalize --step_size full",
    "--bits 3 --equalize --schemes clip",
    "--bits 3 --equalize --schemes clip --clip_p 2",
    "--bits 3 --equalize --schemes clip --clip_p 3",
    "--bits 3 --per_channel --step_size full",
    "--bits 2 --per_channel --step_size full",
]
EQUALIZED = [
    "--bits 3 --step_size full",
    "--bits 3 --schemes clip",
    "--bits 3 --schemes clip --clip_p 2",
    "--bits 4 --step_size full",
]
EQUALIZE = """
import sys, torch
sys.path.insert(0, sys.argv[3])
from plain_network import PlainNetwork
job = torch.load(sys.argv[1], weights_only=True)
net = PlainNetwork(job["nodes"]).eval()
net.load_state_dict(job["network"])
if sys.argv[4] == "brevitas":
    from brevitas.graph.quantize import preprocess_for_quantize
    net = preprocess_for_quantize(net, equalize_iters=20, merge_bn=False)
else:
    from aimet_torch.cross_layer_equalization import CrossLayerScaling
    CrossLayerScaling.scale_model(net, dummy_input=job["images"])
layers = [m for m in net.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
torch.save([(m.weight.detach(), m.bias.detach()) for m in layers], sys.argv[2])
"""


CORRECTIONS = {
    "uncorrected": "",
    "corrected": " --output_bias_correction",
    "corrected on float inputs": " --output_bias_correction float",
}


def run(title: str, cases: list[str], data_dir: str, job: dict) -> None:
    """Print the accuracy of each case with each correction."""
    for words in cases:
        for name, correction in CORRECTIONS.items():
            per_channel = "--per_channel" in words
            found = toolkits.quantize_ours(WEIGHTS, words + correction, data_dir, job, per_channel)
            print(f"{title}: {words}, {name}: {100 * found['accuracy']:.2f}", flush=True)


def main() -> None:
    """Print all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="./data")
    parser.add_argument("--brevitas", type=Path, metavar="PYTHON")
    parser.add_argument("--aimet", type=Path, metavar="PYTHON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    job = toolkits.make_job(WEIGHTS, args.data_dir)
    run("ours", CASES, args.data_dir, job)
    load = toolkits.load
    for tool in ("brevitas", "aimet"):
        if not getattr(args, tool):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "job.pt"), Path(folder, "equalized.pt")
            sent = {"nodes": job["nodes"], "network": job["network"]}
            torch.save(sent | {"images": job["calibration_images"][:8]}, given)
            peers = ROOT / "benchmarks" / "peers"
            python = getattr(args, tool).absolute()
            subprocess.run([python, "-c", EQUALIZE, given, made, peers, tool], check=True)
            tensors = torch.load(made, weights_only=True)

        def load_equalized(*of_ours, tensors=tensors):  # noqa: ANN001, ANN002, ANN202
            network = load(*of_ours)
            graph = copy_graph(network.graph)
            for name, pair in zip([*layers(graph)], tensors, strict=True):
                for kind, tensor in zip(("weight", "bias"), pair, strict=True):
                    set_constant(graph, layers(graph)[name], kind, tensor)
            return network._replace(graph=copy_graph(graph))

        toolkits.load = load_equalized
        run(f"equalized by {toolkits.PEERS[tool]}", EQUALIZED, args.data_dir, job)


if __name__ == "__main__":
    main()
