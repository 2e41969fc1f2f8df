"""The exponential average of the weights, and label smoothing, against their definitions."""

import copy
import json
import math

import pytest
import reference
import test_distributed
import tiny_scripts
import torch
from torch import nn

import train
import utils
from engine.images.loader import Loader
from engine.system import distributed
from engine.system.errors import FileError
from engine.training.averaging import averaged_network, make_average
from engine.training.checkpoints import load_checkpoint, save_checkpoint
from engine.training.train_state import TrainState

DECAY = 0.8
BATCHES = 5  # an epoch of the tiny data set
TINY = tiny_scripts.TINY


def begin(decay=DECAY):
    torch.manual_seed(3)
    net = tiny_scripts.Tiny(10)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9, weight_decay=5e-4)
    scheduler = utils.make_scheduler("none", optimizer, 0.1, "default", 2)
    average = None if decay is None else make_average(net, decay)
    return TrainState(net, optimizer, scheduler, average=average)


def train_on(state, after_batch=None, criterion=None):
    options = {"batch_size": 32, "mean": TINY.mean, "std": TINY.std}
    train_loader = Loader(TINY.train_images, TINY.train_labels, seed=3, shuffle=True, **options)
    test_loader = Loader(TINY.test_images, TINY.test_labels, **options)
    config = train.FitConfig(2, criterion or nn.CrossEntropyLoss())
    training = train.fit(state, train_loader, test_loader, [train.Phase(0)], config)
    return reference.go_through(training, after_batch)


@pytest.mark.parametrize("decay", [0.0, DECAY, 0.999])
def test_the_average_is_that_of_the_definition(decay):
    state, weights = begin(decay), []

    def record(progress):
        weights.append({name: p.detach().double() for name, p in state.net.named_parameters()})

    train_on(state, record)
    assert len(weights) == state.average.n_averaged == 2 * BATCHES
    expected = copy.deepcopy(weights[0])
    for w in weights[1:]:
        expected = {name: decay * expected[name] + (1 - decay) * w[name] for name in w}
    for name, p in state.average.module.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_averaging_leaves_the_training_as_it_is():
    plain, averaged = begin(None), begin()
    train_on(plain)
    train_on(averaged)
    for p, q in zip(plain.net.parameters(), averaged.net.parameters(), strict=True):
        assert torch.equal(p, q)


class Cut(Exception):
    pass


def cut(state, n, path):
    """Train n batches, save, and die."""

    def save_and_die(progress):
        if progress.epoch * BATCHES + progress.batch == n:
            save_checkpoint(state.state_dict(None), path)
            raise Cut

    with pytest.raises(Cut):
        train_on(state, save_and_die)


@pytest.mark.parametrize("cut_at", [1, 4, 5, 6, 10])  # of 10 batches
def test_a_run_that_was_cut_gives_the_same_average(cut_at, tmp_path):
    whole, resumed = begin(), begin()
    train_on(whole)
    cut(begin(), cut_at, tmp_path / "c")
    resumed.load_state_dict(load_checkpoint(tmp_path / "c"), 2, BATCHES)
    assert resumed.average.n_averaged == cut_at
    train_on(resumed)
    expected = whole.average.state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in resumed.average.state_dict().items())


def test_an_average_begins_where_the_checkpoint_has_none(tmp_path):
    old = begin(None)
    cut(old, 6, tmp_path / "c")
    content = load_checkpoint(tmp_path / "c")
    assert "average" not in content
    state = begin()
    state.load_state_dict(content, 2, BATCHES)
    assert state.average.n_averaged == 0
    for key, t in state.average.module.state_dict().items():
        assert torch.equal(t, old.net.state_dict()[key])
    train_on(state)
    assert state.average.n_averaged == 4


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        ("module.linear.bias", torch.zeros(3), r"module\.linear\.bias"),
        ("module.linear.bias", torch.full((10,), math.nan), r"module\.linear\.bias"),
        ("n_averaged", torch.tensor(-5), "average of -5 steps"),
    ],
)
def test_what_is_no_average_of_this_network_is_refused(key, value, where, tmp_path):
    cut(begin(), 6, tmp_path / "c")
    content = load_checkpoint(tmp_path / "c")
    content["average"][key] = value
    with pytest.raises(FileError, match=rf"average: not what this run .*{where}"):
        begin().load_state_dict(content, 2, BATCHES)


def test_what_a_foreign_checkpoint_has_besides_is_ignored(tmp_path):
    cut(begin(), 6, tmp_path / "c")
    content = load_checkpoint(tmp_path / "c")
    content["average"] |= {"foreign": 1, 5: 2}
    begin().load_state_dict(content, 2, BATCHES)


def test_statistics_are_those_of_the_averaged_network():
    """After a cumulative average over the images, not those of the last weights."""
    state = begin()
    train_on(state)
    images = torch.randn(2, 32, 3, 8, 8)
    expected = copy.deepcopy(state.average.module).train()
    for norm in (m for m in expected.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for x in images:
            expected(x)
    net = averaged_network(state.average, images)
    assert not net.training
    for key, t in net.state_dict().items():
        torch.testing.assert_close(t, expected.state_dict()[key])
    norms = [key for key in expected.state_dict() if key.endswith("running_var")]
    assert norms and all(
        not torch.allclose(net.state_dict()[key], state.net.state_dict()[key]) for key in norms
    )


def test_a_network_without_batch_norms_is_averaged_as_it_is():
    net = nn.Linear(2, 2)
    average = make_average(net, 0.5)
    average.update_parameters(net)
    assert torch.equal(averaged_network(average, iter(())).weight, net.weight)


def averaged_by_ranks():
    with distributed.process_group("cpu"):
        torch.manual_seed(0)
        net = tiny_scripts.TinyFused().double()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, 0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        state = TrainState(net, optimizer, scheduler, average=make_average(net, DECAY))
        share = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
        loader = test_distributed.Doubles(seed=1, augment=True, shuffle=True, **share)
        test_loader = test_distributed.Doubles(cache=True)
        config = train.FitConfig(2, nn.CrossEntropyLoss(), torch.float64)
        reference.go_through(train.fit(state, loader, test_loader, [train.Phase(0)], config))
        images = (x for x, _ in test_loader.batches(0))
        net = averaged_network(state.average, images)
        return {key: t.numpy() for key, t in net.state_dict().items()}


@pytest.mark.slow
def test_ranks_have_the_average_of_one_process():
    [one] = test_distributed.on(1, averaged_by_ranks)
    first, second = test_distributed.on(2, averaged_by_ranks)
    for key, value in one.items():
        assert value == pytest.approx(first[key], rel=1e-9, abs=1e-10), key
        assert (first[key] == second[key]).all(), key


# --- the scripts -----------------------------------------------------------------------------

FLAGS = [*tiny_scripts.FLAGS, "--n_epochs", "3", "--ema", "0.8"]


def run_here(monkeypatch, tmp_path, *flags, main=train.main):
    monkeypatch.chdir(tmp_path)
    main([*FLAGS, *flags])


def test_the_average_is_saved_measured_and_quantized(monkeypatch, tmp_path, capsys):
    run_here(monkeypatch, tmp_path, "--recalibrate_bn_images", "100", "--label_smoothing", "0.1")
    record = json.loads((tmp_path / "r.json").read_text())
    averaged = json.loads((tmp_path / "r_ema.json").read_text())
    assert averaged["final_accuracy"] == record["ema_accuracy"]
    assert averaged["final_loss"] == record["ema_loss"] != record["final_loss"]
    assert averaged["averaged_steps"] == 3 * BATCHES and averaged["bn_images"] == 100
    assert "weights averaged with decay 0.8" in record["settings"]["plan"]
    net = tiny_scripts.Tiny(10)
    net.load_state_dict(torch.load(tmp_path / "r_ema.pt", weights_only=True))
    assert set(torch.load(tmp_path / "r.pt", weights_only=True)) == set(net.state_dict())

    quantize = ["r_ema.pt", "--bits", "8", "--schemes", "uniform", "--no_plots", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        tiny_scripts.quant_inference.main([*quantize, "--batch_size", "64"])
    assert end.value.code == 0 and "error" not in capsys.readouterr().err
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows[0]["accuracy"] == averaged["final_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--ema", "0.8"], ["--qat_bits", "4,4", "--qat_from", "1"]])
def test_two_processes_write_the_files_of_one(flags, tmp_path):
    """The average, or the network and its learned steps: all of it measured together."""
    flags = [*tiny_scripts.FLAGS, "--model", "TinyFused", "--n_epochs", "2", *flags]
    codes = test_distributed.on(2, test_distributed.run, tmp_path, "train.py", *flags)
    assert codes == [0, 0], test_distributed.logs(tmp_path)
    assert test_distributed.logs(tmp_path)[1] == ""
    record = json.loads((tmp_path / "r.json").read_text())
    if "--ema" in flags:
        averaged = json.loads((tmp_path / "r_ema.json").read_text())
        assert averaged["final_accuracy"] == record["ema_accuracy"]
        assert (tmp_path / "r_ema.pt").exists()
    else:
        assert record["quantized_accuracy"] == record["history"][-1]["test_accuracy"]


def test_combined_protocol_averages_too(monkeypatch, tmp_path):
    run_here(
        monkeypatch, tmp_path, "--phases", "0:none", "1:VarianceNorm=1",
        main=tiny_scripts.combined_protocol.main,
    )  # fmt: skip
    assert (tmp_path / "r_ema.pt").exists()
    assert json.loads((tmp_path / "r_ema.json").read_text())["bn_images"] == 160


def test_an_earlier_average_is_kept_and_a_run_without_touches_none(monkeypatch, tmp_path, capsys):
    run_here(monkeypatch, tmp_path)
    first = (tmp_path / "r_ema.pt").read_bytes()
    run_here(monkeypatch, tmp_path)
    assert (tmp_path / "r_ema_old1.pt").read_bytes() == first
    train.main([*tiny_scripts.FLAGS, "--n_epochs", "1"])
    assert (tmp_path / "r_ema.pt").exists() and not (tmp_path / "r_ema_old2.pt").exists()


def test_a_branch_begins_an_average_and_another_decay_is_no_resume(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*tiny_scripts.FLAGS, "--n_epochs", "2"])
    train.main([*FLAGS, "--run_name", "branch", "--init_from", "r.ckpt"])
    assert "the average of the weights begins here" in capsys.readouterr().out
    record = json.loads((tmp_path / "branch_ema.json").read_text())
    assert record["averaged_steps"] == BATCHES
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, "--run_name", "branch", "--ema", "0.9", "--resume"])
    assert end.value.code == 1 and "(--ema, --init_from)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        train.main([*FLAGS, "--run_name", "late", "--init_from", "r.ckpt",
                    "--label_smoothing", "0.1"])  # fmt: skip
    assert end.value.code == 1 and "(--label_smoothing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--ema", "1"], 2, "'1' is not a finite number of at least 0, below 1"),
        (["--ema", "-0.1"], 2, "'-0.1' is not a finite number of at least 0"),
        (["--ema", "nan"], 2, "'nan' is not a finite number of at least 0"),
        (["--label_smoothing", "1"], 2, "'1' is not a finite number of at least 0, below 1"),
        (["--label_smoothing", "much"], 2, "'much' is not a finite number of at least 0"),
        (["--regularizer", "VarianceNorm", "--penalty_every", "999"], 2, "999: an epoch has "),
        (["--recalibrate_bn_images", "1"], 2, "'1' is not a whole number of at least 2"),
        (["--recalibrate_bn_images", "161"], 2, "161: there are 160 training images"),
    ],
)
def test_bad_values_are_one_line(flags, code, message, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, tmp_path, *flags)
    printed = capsys.readouterr().err
    assert end.value.code == code and message in printed and printed.count("\n") == 1
    assert not list(tmp_path.glob("*.pt"))


def test_statistics_are_not_estimated_on_a_batch_of_one_image(monkeypatch, tmp_path):
    run_here(monkeypatch, tmp_path, "--batch_size", "33", "--recalibrate_bn_images", "100")
    assert json.loads((tmp_path / "r_ema.json").read_text())["bn_images"] == 99


def test_a_coarse_choice_of_penalized_batches_is_told(monkeypatch, tmp_path, capsys):
    flags = ["--batch_size", "40", "--regularizer", "VarianceNorm", "--penalty_every"]
    run_here(monkeypatch, tmp_path, *flags, "3")
    line = "--penalty_every 3: in 2 of the 4 batches of an epoch, which is 1.5 times the penalty"
    assert line in capsys.readouterr().out
    run_here(monkeypatch, tmp_path, *flags, "2")
    assert "--penalty_every 2:" not in capsys.readouterr().out


def test_images_for_statistics_need_an_average(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda *_: None)
    train.main([*tiny_scripts.FLAGS, "--recalibrate_bn_images", "64"])
    assert "--recalibrate_bn_images (needs --ema)" in capsys.readouterr().err


# --- label smoothing -------------------------------------------------------------------------


def test_smoothed_cross_entropy_is_that_of_mixed_targets(problem):
    """L = −Σ_k t_k log p_k with t = (1 − ε)·onehot + ε/K, and its gradients, in float64."""
    torch.manual_seed(0)
    net, plain = reference.SmoothNet().double(), reference.SmoothNet().double()
    plain.load_state_dict(net.state_dict())
    x, y = problem
    criterion = utils.make_criterion("CE", 0.3)
    loss, _, _ = train.compute_gradients(net, criterion, None, x, y)
    logits = plain(x)[0]
    targets = 0.7 * nn.functional.one_hot(y, logits.shape[1]) + 0.3 / logits.shape[1]
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_flag_smooths_labels_in_training_and_test():
    state = begin(None)
    history = train_on(state, criterion=utils.make_criterion("CE", 0.2))
    options = {"batch_size": 64, "mean": TINY.mean, "std": TINY.std}
    [(x, y)] = Loader(TINY.test_images, TINY.test_labels, **options).batches(0)
    with torch.no_grad():
        log_p = state.net.eval()(x)[0].log_softmax(1)
    targets = 0.8 * nn.functional.one_hot(y, 10) + 0.02
    assert history[-1]["test_loss"] == pytest.approx(-(targets * log_p).sum(1).mean().item())
    assert history[0]["train_loss"] != train_on(begin(None))[0]["train_loss"]
    args = train.make_parser().parse_args(["--label_smoothing", "0.2"])
    assert train.make_config(args, 128, 10).criterion.label_smoothing == 0.2
