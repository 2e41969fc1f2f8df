"""README and docs: commands parse, files exist, numbers are those of the records, code runs."""

import csv
import gzip
import importlib
import json
import math
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from packaging.requirements import Requirement
from PIL import Image
from torch import nn

import combined_protocol
import data
import flags as all_flags
import models
import quant_utils
import regularizers
import study
import train
import utils
from engine.images.loader import Loader
from engine.networks.export import export_network
from engine.networks.fast_layers import use_fast_layers
from engine.networks.folding import fold_batch_norms
from engine.networks.outputs import run_network
from engine.quantization.weights import quantize_model
from engine.step.gradients import compute_gradients
from engine.step.trial import check_criterion
from engine.system.cli import warn_unused_flags

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = PAGES["README.md"]


# --- commands --------------------------------------------------------------------------------


def commands(pattern, pages=PAGES):
    """Every line of a shell block, and every command inside a sentence, that begins so."""
    found = []
    for text in pages.values():
        lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
        inline = [c for c in re.findall(r"`([^`\n]+)`", text) if " " in c]
        found += [line for line in lines + inline if re.match(pattern, line)]
    return list(dict.fromkeys(found))


OF_EXTENDING = ("power_of_two", "mynorm")  # names that only exist once the code there is added


@pytest.mark.parametrize("command", commands(r"\S*python |torchrun "))
def test_every_command_parses(command):
    words = shlex.split(command, comments=True)
    if words[1] == "-m":
        assert words[2] in ("venv", "pip", "ruff", "pytest")
        files = words[words.index("-r") + 1 :] if "-r" in words else []
        assert all((ROOT / name).is_file() for name in files)
        return
    first = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[first]
    if script.parent != ROOT:
        source = script.read_text(encoding="utf-8")
        assert all(word in source for word in words[first + 1 :] if word.startswith("--"))
        return
    module = importlib.import_module(script.stem)
    flags = [word for word in words[first + 1 :] if word not in ("--help", *OF_EXTENDING)]
    flags = ["ConvNet" if word == "TinyResNet" else word for word in flags]  # of extending.md, too
    module.make_parser().parse_args(flags)


def test_no_command_is_overlooked():
    n_blocks = sum(text.count("```sh\n") for text in PAGES.values())
    assert len(commands(r"\S*python |torchrun ")) >= 40 and n_blocks >= 20
    known = r"\S*python |torchrun |make |mkdir |wandb |npm install |ray "
    for text in PAGES.values():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            assert all(re.match(known, line) for line in block.splitlines())


def test_the_command_of_the_published_version_is_there_to_the_letter():
    published = (
        "python train.py --run_name YOURNAME_whatisthistestfor_1 --model ConvNet --dataset CIFAR10 "
        "--n_epochs 25 --lr 0.1 --criterion CE --scheduler exponential --gamma 0.99 "
        "--regularizer L2Grad --lmbda 0.01 --seed 242"
    )
    assert published in commands("python train.py", {"README.md": README})


def test_every_flag_of_the_sweep_parses():
    yaml = pytest.importorskip("yaml")  # comes with wandb
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    parser = importlib.import_module(sweep["program"].removesuffix(".py")).make_parser()
    longest = max(len(of.get("values", [0])) for of in sweep["parameters"].values())
    for i in range(longest):
        flags = []
        for name, of in sweep["parameters"].items():
            values = of.get("values", [of.get("value")])
            value = values[i % len(values)]
            flags += [f"--{name}"] if value is True else [f"--{name}={value}"]
        args = vars(parser.parse_args(flags))
        assert sweep["parameters"].keys() <= args.keys()


def test_make_knows_every_target():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = {shlex.split(command, comments=True)[1] for command in commands("make ")}
    assert {"demo", "test"} <= wanted <= set(targets)


def test_every_flag_that_is_named_is_one():
    known = {
        option
        for name in ("train", "combined_protocol", "quant_inference", "study")
        for action in importlib.import_module(name).make_parser()._actions
        for option in action.option_strings
    }
    elsewhere = {"--order", "--greet", "--nproc_per_node", "--max_restarts"}  # docs/extending.md, …
    elsewhere |= {"--rounds", "--rows", "--peers"}  # benchmarks/step_time.py
    named = {
        flag
        for page, text in PAGES.items()
        if page != "CONTRIBUTING.md"
        for code in re.findall(r"`([^`\n]+)`", text)
        for flag in re.findall(r"--[a-zA-Z][\w-]*", code)
    }
    assert len(named) > 40 and named <= known | elsewhere


# --- files -----------------------------------------------------------------------------------


def links(text):
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in targets if "://" not in target]


@pytest.mark.parametrize(
    ("page", "target"),
    [(page, target) for page, text in PAGES.items() for target in dict.fromkeys(links(text))],
)
def test_every_linked_file_exists(page, target):
    assert (ROOT / page).parent.joinpath(target).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"`([\w./-]+\.py)`", PAGES[page])  # files that are made have other endings
    named += re.findall(
        r"`((?:engine|analysis|tests|benchmarks|results|docs)/[^`\s*…]*)`", PAGES[page]
    )
    if page != "README.md":  # it may name packages without their folders
        named = [name for name in named if name.count("/") or (ROOT / name).exists() or "_" in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_ranges_of_versions_hold_the_pins():
    pins, ranges = (
        [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line[0] != "#"]
        for name in ("requirements.txt", "requirements-ranges.txt")
    )
    assert [each.name for each in ranges] == [each.name for each in pins]
    for pin, each in zip(pins, ranges, strict=True):
        [version] = [specifier.version for specifier in pin.specifier]
        assert each.specifier.contains(version), pin


@pytest.mark.parametrize("folder", ["engine", "analysis"])
def test_the_map_lists_every_room_with_what_it_holds(folder):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent for path in (ROOT / folder).glob("**/[!_]*.py")}
    assert len(rooms) > 1
    for room in rooms:
        name = f"{room.name}/" if room.parent == ROOT else f"  {room.name}/"
        assert re.search(rf"^{name} +\w.*", page, re.MULTILINE), room


def test_the_readme_leaves_no_script_out_and_is_short():
    named = set(re.findall(r"`(\w+\.py)`", README))
    assert named == {path.name for path in ROOT.glob("*.py")}
    assert README.count("\n") <= 200


def test_the_readme_lists_every_page():
    assert {page for page in PAGES if page.startswith("docs/")} <= set(links(README))


@pytest.mark.parametrize("folder", ["precision", "quantize", "training"])
def test_packed_records_are_read_as_the_log_says(folder, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = (ROOT / "results" / folder / "LOG.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", log, re.DOTALL)
    names: dict = {}
    exec(block, names)
    records = names["records"]
    assert list(records) == sorted(records) and len(records) > 5
    for path, record in records.items():
        assert isinstance(record, dict if path.endswith(".json") else str)


@pytest.mark.parametrize("folder", ["precision", "quantize"])
def test_the_merged_table_is_that_of_the_records(folder):
    path = ROOT / "results" / folder / "records.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = [json.loads(line)["content"] for line in file]
    records = [record for record in records if isinstance(record, dict)]
    rows = [row for record in records for row in record.get("rows", ())]
    kept = sorted([str(row["accuracy"]), str(row["squared_error"])] for row in rows)
    with open(path.with_name("results.csv"), newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert sorted([row["accuracy"], row["squared_error"]] for row in table) == kept


# --- the answer ------------------------------------------------------------------------------

ANSWER = README[README.index("## The answer") : README.index("## Train")]
STUDY = ROOT / "results" / "study"
CLAIM = ROOT / "results" / "claim"
OF_CLAIM = [CLAIM / name for name in ("ResNet20@0.5", "ResNet20@0.25", "VGGSmall@0.125")]
QUOTED = [line for line in ANSWER.splitlines() if line.startswith("|")]
VARIANTS = [line.split("|")[1].strip() for line in QUOTED[2:]]


def test_every_row_of_the_answer_is_one_of_the_first_table_of_the_study():
    tables = (STUDY / "tables.md").read_text(encoding="utf-8")
    first = [line for line in tables.split("\n\n")[1].splitlines() if line.startswith("|")]
    assert QUOTED[:2] == first[:2] and set(QUOTED) <= set(first)
    assert "control" in VARIANTS and 2 <= len(VARIANTS) <= 8


def test_the_answer_counts_its_variants():
    [(n, of)] = re.findall(r"(\d+)\sof\sthe\sstudy's\s(\d+)\svariants", ANSWER)
    assert (int(n), int(of)) == (len(VARIANTS), len(study.VARIANTS))


@pytest.mark.parametrize(
    ("page", "folders"),
    [
        ("README.md", [STUDY, *OF_CLAIM]),
        ("results/study/README.md", [STUDY]),
        ("results/claim/README.md", OF_CLAIM),
    ],
)
def test_every_interval_that_is_quoted_is_of_the_study(page, folders):
    text = ANSWER if page == "README.md" else (ROOT / page).read_text(encoding="utf-8")
    known = set()
    if folders != [STUDY]:
        tested = (CLAIM / "hypotheses.md").read_text(encoding="utf-8")
        for mean, half in re.findall(r"([-+][\d.]+) ± ([\d.]+)", tested):
            known |= {(f"{float(mean):z.{n}f}", f"{float(half):.{n}f}") for n in (0, 1, 2)}
    names = ("differences.csv", "accuracy_drops.csv")
    for path in (folder / name for folder in folders for name in names):
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                mean, low = 100 * float(row["mean"]), 100 * float(row["low"])
                known |= {(f"{mean:z.{n}f}", f"{mean - low:.{n}f}") for n in (0, 1, 2)}
    prose = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    quoted = re.findall(r"([−]?[\d.]+)\s±\s([\d.]*\d)", prose)
    assert len(quoted) > 3
    unknown = [pair for pair in quoted if (pair[0].replace("−", "-"), pair[1]) not in known]
    assert not unknown


def test_the_commands_of_the_study_run_every_variant():
    again = [
        shlex.split(command)[2:]
        for command in commands("python study.py")
        if "study_again" in command
    ]
    args = map(study.make_parser().parse_args, again)
    assert {name for of in args for name in of.only} == set(study.VARIANTS)


def correlations(title):
    tables = (STUDY / "tables.md").read_text(encoding="utf-8")
    lines = tables[tables.index(f"\n{title}") :].split("\n\n")[1].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    column = table[0].index("uniform 3")
    return {row[0]: row[column].split()[0].replace("-", "−").lstrip("+") for row in table[2:]}


def test_correlations_that_are_quoted_are_those_of_the_study():
    between = correlations("Between variants")
    quoted = re.findall(r"(−?0\.\d\d)\sfor\s(\w+)", ANSWER)
    assert len(quoted) > 3 and all(between[name] == rho for rho, name in quoted)
    page = " ".join((STUDY / "README.md").read_text(encoding="utf-8").split())
    for title in ("Between variants", "Between seeds"):
        [text] = re.findall(rf"\*\*{title}.*?\. ", page)
        quoted = re.findall(r"(squared error|\w+) (−?0\.\d\d)", text)
        assert len(quoted) > 3 and all(correlations(title)[name] == rho for name, rho in quoted)


def test_times_that_are_quoted_are_those_of_the_benchmark():
    log = (ROOT / "results" / "speed" / "step_time.log").read_text(encoding="utf-8")
    measured = json.loads(log.splitlines()[-1])
    [price, speedup] = re.search(
        r"step takes ([\d.]+) plain ones and is ([\d.]+)\stimes", README
    ).groups()
    assert price == f"{measured['penalty_ratio']:.1f}"
    assert speedup == f"{measured['l2grad_speedup']:.1f}"
    rows = dict(re.findall(r"\n\| ([^|]+) \|([^\n]+) \|", PAGES["docs/fast_step.md"]))
    names = {"no regularizer": "none", "L2Grad, weights only": "L2Grad, no activations"}
    for name in ("no regularizer", "L1Grad", "L2Grad", "L2Grad, weights only"):
        found = re.findall(rf"\n{names.get(name, name)} +\w+ +([\d.]+) +([\d.]+) .* (\d+)", log)
        (slow, _, most), (full, *_), (fast, ratio, least) = found
        times = " | ".join(f"{float(ms):.0f} ms" for ms in (slow, full, fast))
        assert rows[name].strip() == f"{times} | {float(ratio):.1f} | {most} → {least}"


# --- the code of docs/extending.md -----------------------------------------------------------

REGISTRIES = (
    (regularizers, regularizers.REGULARIZERS),
    (quant_utils, quant_utils.QUANTIZERS),
    (models, models.MODELS),
    (data, data.DATASETS),
    (utils, utils.CRITERIA),
    (study, study.VARIANTS),
)


@pytest.fixture
def extended():
    """Run the page's code, each block in the file that its first line names, as a user would."""
    before = [dict(registry) for _, registry in REGISTRIES]
    names = {module.__name__: dict(vars(module)) for module, _ in REGISTRIES}
    table, names["flags"] = list(all_flags.TRAINING), dict(vars(all_flags))
    for block in re.findall(r"```python\n(.*?)```", PAGES["docs/extending.md"], re.DOTALL):
        [module] = re.findall(r"\A# in ([\w/]+)\.py\n", block)
        if module == "engine/deploy/supported":  # see tests/deploy/test_spellings.py
            continue
        exec(compile(block, module, "exec", dont_inherit=True), names[module])
    yield
    all_flags.TRAINING[:] = table
    for (_, registry), items in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(items)


def test_the_flag_of_the_page_is_one_and_needs_the_other(extended, capsys):
    parser = train.make_parser()
    assert "epochs between greetings (default: 1)" in " ".join(parser.format_help().split())
    for given, every in ([], 1), (["--greet"], 3):
        args = parser.parse_args([*given, "--greet_every", "3"])
        added = [flag for flag in parser.flags if flag.name.startswith("greet")]
        warn_unused_flags(parser, args, added)
        assert args.greet_every == every
        assert ("--greet_every (needs --greet)" in capsys.readouterr().err) == (every == 1)


def tiny_net():
    torch.manual_seed(0)
    return models.MODELS["TinyResNet"](num_classes=4).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (6,), generator=generator)


def test_the_regularizer_of_the_readme_is_that_of_the_page(extended):
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block in PAGES["docs/extending.md"]
    made = regularizers.make_regularizer("mynorm", 2.0)
    assert made([torch.ones(16)]).item() == pytest.approx(4.0)


def test_the_regularizer_of_the_page_is_a_choice_of_the_scripts(extended):
    assert "MyNorm" in train.make_parser().format_help()
    phase = combined_protocol.parse_phase("6:MyNorm=0.001+RangeNorm=0.1")
    assert phase.regularizer.name == "MyNorm+RangeNorm"


def test_the_option_of_the_page_is_a_flag(extended):
    assert train.make_parser().parse_args(["--order", "3"]).order == 3
    made = regularizers.make_regularizer("ordernorm", 2.0, order=3)
    assert made([torch.ones(27)]).item() == pytest.approx(6.0)


def test_the_network_and_the_gradient_penalty_of_the_page_take_an_exact_step(extended):
    net, slow_net, (x, y) = use_fast_layers(tiny_net()), tiny_net(), batch()
    criterion, penalty_of = nn.CrossEntropyLoss(), regularizers.make_regularizer("saliency", 0.1)
    loss, penalty, _ = compute_gradients(net, criterion, penalty_of, x, y, torch.float64)
    logits, activations = reference.WithActivations(slow_net)(x)
    assert [tuple(a.shape) for a in activations] == 3 * [(6, 16, 8, 8)] + 2 * [(6, 32, 4, 4)]
    assert len(run_network(net, x, with_activations=True)[1]) == 5
    weights = [p for name, p in slow_net.named_parameters() if p.dim() > 1]
    slow_loss = criterion(logits, y)
    grads = torch.autograd.grad(slow_loss, weights, create_graph=True)
    slow_penalty = 0.1 * sum((w * g).abs().sum() for w, g in zip(weights, grads, strict=True))
    slow = torch.autograd.grad(slow_loss + slow_penalty, list(slow_net.parameters()))
    assert (loss.item(), penalty.item()) == pytest.approx((slow_loss.item(), slow_penalty.item()))
    for p, g in zip(net.parameters(), slow, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_network_of_the_page_trains_in_bfloat16_and_quantizes(extended):
    net, (x, y) = use_fast_layers(tiny_net().float()), batch()
    made = regularizers.make_regularizer("L2Grad", 0.01)
    compute_gradients(net, nn.CrossEntropyLoss(), made, x.float(), y, torch.bfloat16)
    assert all(p.grad.isfinite().all() for p in net.parameters())
    net_q, errors = quantize_model(net, quant_utils.uniform, 4, image_shape=(3, 8, 8))
    names = ["stem.0", *(f"blocks.{i}.conv{n}" for i in (0, 1) for n in (1, 2))]
    assert [e.name for e in errors] == [*names, "blocks.1.down.0", "classifier"]
    assert net_q.eval()(x.float()).shape == (6, 4)
    folded = fold_batch_norms(export_network(net.eval(), (3, 8, 8)))
    torch.testing.assert_close(folded(x.float()), net(x.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_bits", [2, 4])
def test_the_quantizer_of_the_page_quantizes_a_network(extended, n_bits):
    quantizer = quant_utils.QUANTIZERS["power_of_two"]
    w = torch.randn(8, 9, generator=torch.Generator().manual_seed(2))
    w[0, 0] = 0
    w_q = quantizer(w, n_bits)
    values = w_q.abs().unique()  # 0 and the powers
    assert len(values) <= 2 ** (n_bits - 1) and values.max() == w.abs().max()
    assert quantizer(w_q, n_bits).equal(w_q)
    net = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    net_q, errors = quantize_model(net, quantizer, n_bits, image_shape=(9,))
    assert net_q[0].weight.equal(quantizer(net[0].weight, n_bits))
    assert all(e.squared_error > 0 and e.parts is None for e in errors)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_quantizer_of_integers_of_the_page_has_them(extended, per_channel):
    quantizer = partial(quant_utils.QUANTIZERS["narrow"], per_channel=per_channel)
    net = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 3))
    net_q, quantized = quantize_model(net, quantizer, 3, image_shape=(9,))
    for layer, (part,) in zip(net_q, (e.parts for e in quantized), strict=True):
        assert set(part.codes.unique().tolist()) <= {-3, -2, -1, 0, 1, 2, 3}
        assert part.codes.abs().max() == 3
        assert (part.codes * part.scale).equal(layer.weight)
        assert len(part.scale.flatten()) == (len(layer.weight) if per_channel else 1)
    assert quant_utils.n_levels("narrow", 3, False) == 7
    assert quant_utils.n_levels("power_of_two", 3, False) == 8


def test_the_loss_of_the_page_is_a_mean(extended):
    criterion = utils.make_criterion("Focal")
    assert check_criterion("Focal", criterion, 10)
    certain = torch.tensor([[20.0, 0.0], [0.0, 0.0]])  # of probability 1 and 1/2
    expected = 0.25 * math.log(2) / 2
    assert criterion(certain, torch.tensor([0, 1])).item() == pytest.approx(expected)


def test_the_data_set_of_the_page_makes_batches(extended, tmp_path):
    with pytest.raises(data.DataError, match="my_images.npz"):
        data.load("MyImages", str(tmp_path), 0)
    n, rng = {"train": 10, "test": 4}, np.random.default_rng(3)
    arrays = {f"{k}_images": rng.integers(0, 256, (n[k], 3, 8, 8), dtype=np.uint8) for k in n}
    arrays |= {f"{k}_labels": rng.integers(0, 5, n[k]) for k in n}
    np.savez(tmp_path / "my_images.npz", **arrays)
    found = data.load("MyImages", str(tmp_path), 0)
    loader = Loader(
        found.train_images, found.train_labels, 4, found.mean, found.std, augment=True, shuffle=True
    )
    sizes = [(tuple(x.shape), tuple(y.shape)) for x, y in loader.batches(0)]
    assert sizes == [((4, 3, 8, 8), (4,)), ((4, 3, 8, 8), (4,)), ((2, 3, 8, 8), (2,))]
    assert found.num_classes == 5


def test_the_files_of_the_page_make_batches(extended, tmp_path):
    with pytest.raises(data.DataError, match="train.txt"):
        data.load("MyFiles", str(tmp_path), 0)
    for i in range(4):
        Image.new("RGB", (9, 12), (i, 0, 0)).save(tmp_path / f"a picture {i}.png")
    (tmp_path / "train.txt").write_text("".join(f"a picture {i}.png {i}\n" for i in range(3)))
    (tmp_path / "test.txt").write_text("a picture 3.png 4\n")
    found = data.load("MyFiles", str(tmp_path), 0, image_size=8, workers=0, cache_images=0)
    settings = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    loader = found.make_loader(found.train_images, found.train_labels, 2, **settings)
    batches = [(x[:, 0].mean((1, 2)).tolist(), y.tolist()) for x, y in loader.batches(0)]
    assert batches == [([0, 1], [0, 1]), ([2], [2])] and found.test_labels.tolist() == [4]
    assert data.accepts("MyFiles", "image_size") and not data.accepts("MyImages", "image_size")


def test_the_variants_of_the_page_can_be_run(extended):
    alone, beside = study.VARIANTS["mynorm"], study.VARIANTS["mynorm_rangenorm"]
    assert train.make_parser().parse_args(alone.flags.split()).regularizer == "MyNorm"
    words = beside.flags.format(first=6, late=7, last=8, lmbda=beside.lmbdas[0]).split()
    args = combined_protocol.make_parser().parse_args(words)
    names = [
        p.regularizer and p.regularizer.name
        for p in map(combined_protocol.parse_phase, args.phases)
    ]
    assert names == [None, "RangeNorm+MyNorm"]
    assert {"mynorm", "control"} <= set(
        study.make_parser().parse_args(["--only", "mynorm", "control"]).only
    )
