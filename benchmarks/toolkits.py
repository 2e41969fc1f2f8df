"""Our quantizers beside two other toolkits: accuracy and processor seconds, setting by setting.

Each file of weights is folded once; every toolkit gets that network, the same images to calibrate
on and to learn rounding from, and is measured by the same code on the same test images. A peer
runs in an environment of its own, whose interpreter is named here; without it its column stays
empty:

    python -m venv brevitas_env
    brevitas_env/bin/python -m pip install torch torchvision brevitas==0.13.4 accelerate pandas tqdm
    python -m venv aimet_env
    aimet_env/bin/python -m pip install torch torchvision aimet-torch==2.42.0
    OMP_NUM_THREADS=1 python benchmarks/toolkits.py weights/control.pt --brevitas \
        brevitas_env/bin/python --aimet aimet_env/bin/python --output results/toolkits

All settings of a toolkit are kept in peers.jsonl.gz; peers.md shows the best of each, which is
chosen on the test images, for all toolkits alike. Finished settings are kept in runs/peers.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import _root  # noqa: F401
import torch
from peers.plain_network import Node, PlainNetwork, measure
from torch import fx

import quant_inference
import utils
from analysis.measured_network import MeasuredNetwork
from analysis.study.records import pack_records
from analysis.study.tables import markdown
from analysis.weights_files import find_weights
from data import ImageDataset
from engine.networks.folding import fold_batch_norms
from engine.networks.graph import aten
from engine.quantization.activations import quantize_activations
from engine.system.environment import describe_environment
from engine.system.hardware import use_ieee_float32
from engine.system.progress import StepDisplay

PEERS = {"brevitas": "Brevitas 0.13.4", "aimet": "AIMET 2.42.0"}
OURS = "ours"
N_TEST, N_CALIBRATION, N_ROUNDING = 2000, 512, 1024
CLOSE = 0.003  # of accuracy: what counts as good as the best
FIXED = f"--fold_bn --device cpu --no_plots --test_subset {N_TEST}"


def row(bits: int, act_bits: int | None = None, **options: bool) -> dict[str, Any]:
    """Return what a row of the table quantizes, and how; act_bits None: weights alone."""
    flags = {"per_channel": False, "equalized": False, "learned": False}
    return {"bits": bits, "act_bits": act_bits, **flags, **options}


ROWS = {
    "4 bits": row(4),
    "4 bits, equalized": row(4, equalized=True),
    "3 bits": row(3),
    "3 bits, equalized": row(3, equalized=True),
    "3 bits, per channel": row(3, per_channel=True),
    "2 bits, per channel": row(2, per_channel=True),
    "2 bits, learned rounding": row(2, learned=True),
    "3 bits, learned rounding": row(3, learned=True),
    "4 bits, learned rounding": row(4, learned=True),
    "(4,4)": row(4, 4),
    "(4,4), equalized": row(4, 4, equalized=True),
    "(4,4), per channel": row(4, 4, per_channel=True),
    "(8,8), per channel": row(8, 8, per_channel=True),
}


def our_settings(how: Mapping[str, Any]) -> list[str]:
    """Return the flags of quant_inference.py for each way in which we quantize a row."""
    if how["learned"]:
        return [
            "--rounding adaround --step_size full",
            "--rounding qdrop --step_size full",
            "--rounding adaround",
        ]
    steps = ["half", "full", *(["auto"] if how["per_channel"] else [])]
    grids = [*(f"--step_size {step}" for step in steps), "--schemes clip"]
    corrected = [f"{grid} --output_bias_correction" for grid in grids]
    if how["act_bits"]:
        ranges = [f"{way} --calibration mse" for way in [grids[-1], *corrected[1:]]]
        return [grids[0], *ranges]
    return [*grids, *corrected, *(f"{way} auto" for way in corrected)]


def flags_of(how: Mapping[str, Any]) -> str:
    """Return the flags of quant_inference.py that a row has, whatever the setting."""
    words = [f"--bits {how['bits']}"]
    words += [f"--act_bits {how['act_bits']}"] if how["act_bits"] else []
    words += ["--per_channel"] if how["per_channel"] else []
    words += ["--equalize"] if how["equalized"] else []
    return " ".join(words)


def quantize_ours(
    weights: Path, words: str, data_dir: str, job: Mapping[str, Any], per_channel: bool
) -> dict[str, Any]:
    """Quantize as quant_inference.py does with these flags; return seconds and measurements."""
    words = words if "--schemes" in words else f"{words} --schemes uniform"
    parser = quant_inference.make_parser()
    args = parser.parse_args([str(weights), "--data_dir", data_dir, *FIXED.split(), *words.split()])
    quant_inference.check_flags(parser, args)
    dataset = utils.load_dataset(args)
    started = time.process_time()
    network = load(weights, args, parser.explicit_flags, dataset)
    exported = time.process_time()
    [how] = quant_inference.make_quantizations(args)
    with StepDisplay(1, "network") as display:
        conditions = quant_inference.make_conditions(args, display)
        images = quant_inference.make_images(args, dataset)
        measured = MeasuredNetwork(weights.stem, network.graph, network.net, conditions, images)
        graph, _ = measured.quantized_weights(how)
        net = quantize_activations(measured.prepared(graph), measured.grids(how.act_bits))
    seconds = time.process_time() - exported
    found = measure(net, job["test_images"], job["test_labels"], per_channel)
    return {"seconds": seconds, "export_seconds": exported - started, **found}


def load(
    weights: Path, args: argparse.Namespace, explicit_flags: set[str], dataset: ImageDataset
) -> quant_inference.LoadedNetwork:
    """Return the network of a file as the flags have it."""
    [network] = quant_inference.load_networks(
        find_weights([str(weights)]), args, explicit_flags, dataset
    ).values()
    return network


def plain_nodes(graph: fx.GraphModule) -> tuple[list[Node], dict[str, torch.Tensor]]:
    """Return the nodes of a `PlainNetwork` that computes a folded graph, and its tensors.

    Raises KeyError for an operation that it has no module for.
    """
    nodes, tensors, names = [], {}, {}
    for node in graph.graph.nodes:
        target, args = node.target, node.args
        if node.op == "placeholder":
            names[node] = "images"
        if node.op != "call_function":
            continue
        if target in (aten.to.dtype, aten.slice.Tensor):  # slices are part of a `subsample`
            names[node] = names[args[0]]
            continue
        options, inputs = {}, [names[args[0]]]
        if target in (aten.conv2d.default, aten.linear.default):
            kind = "conv" if target is aten.conv2d.default else "linear"
            w, bias = (graph.get_buffer(each.target) for each in args[1:3])
            if kind == "conv":
                geometry = dict(zip(("stride", "padding", "dilation"), args[3:6], strict=False))
                groups = args[6] if len(args) > 6 else 1
                options = {
                    "in_channels": w.shape[1] * groups,
                    "out_channels": w.shape[0],
                    "kernel_size": [*w.shape[2:]],
                    "groups": groups,
                    **{name: [*value] for name, value in geometry.items()},
                }
            else:
                options = {"in_features": w.shape[1], "out_features": w.shape[0]}
            tensors |= {f"{node.name}.weight": w.clone(), f"{node.name}.bias": bias.clone()}
        elif target is aten.adaptive_avg_pool2d.default:
            kind, options = "pool", {"output_size": [*args[1]]}
        elif target is aten.add.Tensor:
            kind, inputs = "add", [names[each] for each in args[:2]]
        elif target is aten.pad.default:
            kind, options = "subsample", {"before": args[1][-2], "after": args[1][-1]}
        else:
            kind = {aten.relu.default: "relu", aten.flatten.using_ints: "flatten"}[target]
        nodes.append((node.name, kind, options, inputs))
        names[node] = node.name
    return nodes, tensors


def make_job(weights: Path, data_dir: str) -> dict[str, Any]:
    """Return what all toolkits get: the folded network and the images, normalized."""
    parser = quant_inference.make_parser()
    words = [*FIXED.split(), "--rounding", "adaround", "--output_bias_correction"]
    args = parser.parse_args([str(weights), "--data_dir", data_dir, *words])
    dataset = utils.load_dataset(args)
    graph = fold_batch_norms(load(weights, args, parser.explicit_flags, dataset).graph)
    images = quant_inference.make_images(args, dataset)
    nodes, tensors = plain_nodes(graph)
    net = PlainNetwork(nodes).eval()
    net.load_state_dict(tensors)

    def read(loader: Any) -> torch.Tensor:
        return torch.cat([x for x, _ in loader.batches(0)]).contiguous()

    test, labels = read(images.test), images.test.labels
    float_accuracy = measure(net, test, labels, False)["accuracy"]
    of_graph = measure(graph, test, labels, False)["accuracy"]
    if float_accuracy != of_graph:
        raise ValueError(f"{weights}: the plain network has {float_accuracy}, ours {of_graph}")
    return {
        "nodes": nodes,
        "network": tensors,
        "calibration_images": read(images.calibration),
        "rounding_images": read(images.rounding),
        "test_images": test,
        "test_labels": labels,
        "float_accuracy": float_accuracy,
    }


def run_ours(
    weights: Path, job: Mapping[str, Any], rows: Sequence[str], done: set, data_dir: str
) -> Iterator[dict[str, Any]]:
    """Yield a record for each row and setting of ours that is not done."""
    versions = describe_environment()["versions"]
    for name in rows:
        for setting in our_settings(ROWS[name]):
            if (name, setting) not in done:
                words = f"{flags_of(ROWS[name])} {setting}"
                found = quantize_ours(weights, words, data_dir, job, ROWS[name]["per_channel"])
                yield {"row": name, "setting": setting, **found, "versions": versions}


def run_peer(
    tool: str, python: Path, job: Mapping[str, Any], rows: Sequence[str], done: set, folder: Path
) -> Iterator[dict[str, Any]]:
    """Yield the records that the peer's script prints."""
    path = folder / f"job_{tool}.pt"
    rest = {"rows": {name: ROWS[name] for name in rows}, "done": [list(each) for each in done]}
    torch.save(dict(job) | rest, path)
    script = Path(__file__).parent / "peers" / f"{tool}_ptq.py"
    log = folder / f"{tool}.log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            [python.absolute(), script, path.resolve()],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
        )
        for line in process.stdout:
            if line.startswith("{"):  # toolkits print lines of their own
                yield json.loads(line)
        if process.wait():
            print(f"{PEERS[tool]} ended with exit code {process.returncode}: see {log}")
    path.unlink()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, one a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def best(records: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """Return a row's record of the highest accuracy, of equal ones that of the least time."""
    found = [each for each in records if each["row"] == name]
    return min(found, key=lambda each: (-each["accuracy"], each["seconds"]), default=None)


def cell(record: Mapping[str, Any] | None) -> str:
    """Return accuracy, seconds and setting."""
    if record is None:
        return "–"
    accuracy = f"{100 * record['accuracy']:.2f}"
    return f"{accuracy} ({record['seconds']:.0f} s) {record['setting'].replace('--', '')}"


def lines_of(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Return the lines of one network's table: the best setting of each toolkit, and our place."""
    lines = []
    for name in ROWS:
        found = {tool: best(records[tool], name) for tool in (OURS, *PEERS)}
        peers = [found[tool]["accuracy"] for tool in PEERS if found[tool]]
        place = "–"
        if found[OURS] and peers:
            lead = round(found[OURS]["accuracy"] - max(peers), 6)
            place = "first" if lead >= 0 else "close" if lead >= -CLOSE else "behind"
            place = f"{place}, {100 * lead:+.2f}"
        if any(found.values()):
            lines.append([name, *(cell(each) for each in found.values()), place])
    return lines


def table(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return all networks as Markdown."""
    titles = list(PEERS.values())
    sections = [
        "Test accuracy in % and processor seconds of the best setting of each toolkit, chosen on "
        f"the test images: the first {N_TEST:,}, {N_CALIBRATION} images for calibration, "
        f"{N_ROUNDING:,} for learned rounding, batch norms folded. One network of one seed each. "
        f"The last column: ours less the better peer, in points; close: at most {100 * CLOSE:g} "
        "below."
    ]
    for name, each in networks.items():
        counts = {tool: len(records) for tool, records in each["records"].items()}
        tried = ", ".join(f"{PEERS.get(tool, tool)} {n}" for tool, n in counts.items())
        header = [f"`{name}`, {100 * each['float_accuracy']:.2f} in float", OURS, *titles, "place"]
        sections.append(markdown(header, lines_of(each["records"])))
        sections.append(f"Settings tried, all rows together: {tried}.")
    return "\n\n".join(sections) + "\n"


def main() -> None:
    """Run all toolkits on all files and write table and records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE")
    for tool, title in PEERS.items():
        parser.add_argument(
            f"--{tool}", type=Path, metavar="PYTHON", help=f"interpreter that has {title}"
        )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--tools", nargs="+", choices=[*PEERS, OURS], default=[*PEERS, OURS])
    parser.add_argument("--data_dir", default="./data")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    use_ieee_float32()
    folder = Path("runs/peers").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    networks = {}
    for weights in args.weights:
        job = make_job(weights, args.data_dir)
        records: dict[str, list] = {}
        networks[weights.stem] = {
            "float_accuracy": job["float_accuracy"],
            "records": records,
            "environment": {k: v for k, v in describe_environment().items() if k != "command"},
        }
        for tool in (OURS, *PEERS):
            records[tool] = read_records(folder / f"{weights.stem}.{tool}.jsonl")
        for tool in args.tools:
            done = {(each["row"], each["setting"]) for each in records[tool]}
            if tool == OURS:
                found = run_ours(weights, job, args.rows, done, args.data_dir)
            elif python := getattr(args, tool):
                found = run_peer(tool, python, job, args.rows, done, folder)
            else:
                print(f"{PEERS[tool]} is not run: --{tool} names no interpreter")
                continue
            for record in found:
                print(weights.stem, tool, record["row"], cell(record), flush=True)
                records[tool].append(record)
                with (folder / f"{weights.stem}.{tool}.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
        (args.output / "peers.md").write_text(table(networks), encoding="utf-8")
        (args.output / "peers.jsonl.gz").write_bytes(pack_records(networks))


if __name__ == "__main__":
    main()
    sys.exit(0)
