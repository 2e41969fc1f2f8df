"""Faults, injected: a short round in `make test`, the long one, with counts, in `make faults`."""

import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fork_server
import pytest
import tiny_scripts
import torch
from torch import nn

import combined_protocol
import train
from engine.training import checkpoints

FAST = [*tiny_scripts.FLAGS, "--n_epochs", "4", "--checkpoint_minutes", "0.0001"]
RUNS = [
    (
        "train.py",
        [
            *FAST,
            "--regularizer",
            "L2Grad",
            "--first_regularized_epoch",
            "2",
            "--save_preregularized_model",
        ],
    ),
    (
        "combined_protocol.py",
        [
            *FAST,
            "--phases",
            "0:none",
            "1:VarianceNorm=0.1",
            "2:VarianceNorm=0.1+L1Grad@weights=0.01",
        ],
    ),
]
SIZES = [
    pytest.param("short", id="short"),
    pytest.param("long", id="long", marks=pytest.mark.faults),
]


class OneRun:
    """Starts runs of scripts with a tiny network, one at a time."""

    def start(self, script, argv, cwd, broken=None):
        self.pid = fork_server.launcher().start(tiny_scripts.run_logged, script, argv, cwd, broken)
        return self.pid

    def wait(self):
        return fork_server.launcher().wait(self.pid, 60)

    def run(self, script, argv, cwd, broken=None):
        self.start(script, argv, cwd, broken)
        return self.wait()


@pytest.fixture(scope="module")
def launcher():
    return OneRun()


@pytest.fixture(scope="module")
def uninterrupted(launcher, tmp_path_factory):
    """The results of the uninterrupted RUNS, and how long each takes."""
    results = []
    for script, argv in RUNS:
        folder, seconds = tmp_path_factory.mktemp("uninterrupted"), math.inf
        for _ in range(2):
            started_at = time.monotonic()
            assert launcher.run(script, argv, folder) == 0, read_log(folder)
            seconds = min(seconds, time.monotonic() - started_at)
        results.append((result(folder), seconds))
    return results


def read_log(folder):
    return (folder / "log").read_text()


def result(folder):
    """Weights as bytes, and history without timings."""
    weights = torch.load(folder / "r.pt", weights_only=True)
    history = json.loads((folder / "r.json").read_text())["history"]
    return (
        {name: (t.shape, t.numpy().tobytes()) for name, t in weights.items()},
        [{key: value for key, value in entry.items() if "second" not in key} for entry in history],
    )


def assert_resumes(launcher, number, folder, uninterrupted):
    """What is left is whole, and --resume ends as if nothing had happened."""
    script, argv = RUNS[number]
    checkpoints.load_checkpoint(folder / "r.ckpt")  # raises where there are some and none is whole
    assert launcher.run(script, [*argv, "--resume"], folder) == 0, read_log(folder)
    assert result(folder) == uninterrupted[number][0]
    left = {path.name for path in folder.iterdir()} - {"log", "r_preregul.pt"}
    assert left <= {"r.pt", "r.json", "r.ckpt", "r.ckpt.previous"}


# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)],
)
def test_a_run_survives_a_signal_at_any_moment(number, size, launcher, uninterrupted, tmp_path):
    chance, when = random.Random(number), Counter()
    n_moments = {"short": 2, "long": 30}[size]
    seconds = [seconds for _, seconds in uninterrupted]
    while when.total() - when["after the end"] < n_moments:  # those are too late to count
        which = when.total() % len(RUNS)
        folder = tmp_path / str(when.total())
        folder.mkdir()
        pid = launcher.start(*RUNS[which], folder)
        time.sleep(chance.uniform(0, 1.05) * seconds[which])
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        code = launcher.wait()
        assert code in (0, -number, 128 + number), read_log(folder)
        names = {path.name for path in folder.iterdir()}
        if code == 128 + number:
            assert "Traceback" not in read_log(folder) and "stopped" in read_log(folder)
            assert not any(name.endswith((".tmp", ".lock")) for name in names)
        when[
            "after the end"
            if code == 0
            else "in a write"
            if any(name.endswith(".tmp") for name in names)
            else "while finishing"
            if "r.pt" in names
            else "while training"
            if "r.ckpt" in names
            else "before the first checkpoint"
        ] += 1
        seconds[which] *= 0.9 if code == 0 else 1.02  # the machine may be busier than it was
        assert_resumes(launcher, which, folder, uninterrupted)
    print(
        f"\n{signal.Signals(number).name}: {when.total()} runs, 0 lost, 0 bits different; "
        + ", ".join(f"{n} {moment}" for moment, n in when.items())
    )


@pytest.mark.faults
@pytest.mark.parametrize("name", ["train.py", "combined_protocol.py"])
def test_the_scripts_exit_with_143(name, tmp_path):
    """Through the interpreter: a signal in the middle, and the exit code of the process."""
    process = subprocess.Popen(
        [sys.executable, tiny_scripts.__file__, name, *FAST, "--n_epochs", "100000"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "r.ckpt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "--resume" in error and "Traceback" not in error


# --- writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["fail", pytest.param("die", marks=pytest.mark.faults)])
def test_a_run_survives_every_write_that_breaks(mode, size, launcher, uninterrupted, tmp_path):
    n_broken, went_on = 0, 0
    for number in range(1, 1000, {"short": 41, "long": 1}[size]):
        which = number % len(RUNS)
        script, argv = RUNS[which]
        folder = tmp_path / str(number)
        folder.mkdir()
        code = launcher.run(script, argv, folder, (number, mode))
        log = read_log(folder)
        if "write breaks" not in log:
            break  # there are fewer writes than that
        n_broken, went_on = n_broken + 1, went_on + (code == 0)
        assert code in ((0, 1) if mode == "fail" else (-signal.SIGKILL,)), log
        assert code != 1 or "error:" in log.splitlines()[-1], log
        assert "Traceback" not in log and log.count("No space") <= (mode == "fail")
        if code == 0:
            assert result(folder) == uninterrupted[which][0]
        assert_resumes(launcher, which, folder, uninterrupted)
    assert n_broken > 1
    print(
        f"\nwrites that {mode}: {n_broken}, training went on after {went_on}, 0 runs lost, "
        "0 bits different"
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_told_and_resumed_from(small_disk, launcher, uninterrupted):
    script, argv = RUNS[0]
    assert launcher.run(script, argv, small_disk, (60, "die")) == -signal.SIGKILL
    before = checkpoints.load_checkpoint(small_disk / "r.ckpt")["state"]
    for half in small_disk.glob(".*.tmp"):  # --resume would, and have room then
        half.unlink()
    with open(small_disk / "ballast", "wb", buffering=0) as ballast:
        with pytest.raises(OSError, match="No space"):
            while True:
                ballast.write(bytes(1024))
    assert launcher.run(script, [*argv, "--resume"], small_disk) == 1
    (small_disk / "ballast").unlink()
    after = checkpoints.load_checkpoint(small_disk / "r.ckpt")["state"]
    assert (after["epoch"], after["batch"]) == (before["epoch"], before["batch"])
    assert_resumes(launcher, 0, small_disk, uninterrupted)


def test_a_folder_that_goes_away_is_told_in_one_line(launcher, tmp_path):
    script, argv = RUNS[0]
    (tmp_path / "gone").mkdir()
    launcher.start(script, [*argv, "--save_file", "gone/r", "--n_epochs", "30"], tmp_path)
    while not (tmp_path / "gone" / "r.ckpt").exists():
        time.sleep(0.01)
    os.rename(tmp_path / "gone", tmp_path / "elsewhere")  # at once, whatever is being written
    assert launcher.wait() == 1
    lines = read_log(tmp_path).splitlines()
    assert "Traceback" not in read_log(tmp_path)
    assert [line for line in lines if "error:" in line] == [lines[-1]]
    assert any("training continues" in line for line in lines)


# --- hostile files and command lines ----------------------------------------------------------


@pytest.fixture
def alarm():
    """Call it before each case: a case that hangs for 20 s raises."""

    def hang(*_):
        raise TimeoutError("this case hangs")

    before = signal.signal(signal.SIGALRM, hang)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run_here(script, argv):
    """Return the exit code and what a terminal would show of stderr."""
    errors = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stderr(errors), redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        code = tiny_scripts.run(script, argv)
    return code, errors.buffer.getvalue().decode()


class NoTracker:
    run = None

    def __init__(self, *_):
        pass

    def log(self, values):
        pass

    summarize = log_weights = fail = log

    def close(self):
        pass


class Runs:
    """A pickle that makes a file, or worse, when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def flip(chance, raw, tree):
    flipped = bytearray(raw)
    for _ in range(chance.choice([1, 1, 2, 10])):
        flipped[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def cut(chance, raw, tree):
    return raw[: chance.randrange(len(raw))]


def splice(chance, raw, tree):
    a, b, c = (chance.randrange(len(raw)) for _ in range(3))
    return raw[:a] + chance.choice([b"", raw[b:c], chance.randbytes(9), bytes(500)]) + raw[b:]


def repickle(chance, raw, tree):
    """Break the pickle inside, with checksums that are right."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                content = chance.choice([flip, flip, flip, cut, splice])(chance, content, tree)
            new.writestr(name, content)
    return changed.getvalue()


def strange(chance):
    """Return a value that has no business in a checkpoint, or not there."""
    nested = []
    for _ in range(chance.choice([3, 200])):
        nested = [nested]
    return chance.choice(
        [
            None,
            True,
            -1,
            0,
            1,
            3,
            2**62,
            10**400,
            -0.5,
            1e308,
            math.inf,
            math.nan,
            "",
            "x\ny",
            "\ud800",
            "../../x",
            b"x",
            [],
            {},
            (),
            [None],
            {"a": 1},
            {1: 2},
            nested,
            torch.zeros(()),
            torch.zeros(3),
            torch.full((2, 2), math.nan),
            torch.zeros(3, dtype=torch.int8),
            torch.zeros(1).expand(10**6),
            torch.eye(3).to_sparse(),
            torch.zeros(2, device="meta"),
            nn.Parameter(torch.zeros(4)),
            torch.zeros(0),
            torch.zeros(4, dtype=torch.complex64),
        ]
    )


def change(chance, node):
    """Return the tree with one place in it changed."""
    if isinstance(node, dict | list | tuple) and node and chance.random() < 0.85:
        copy = dict(node) if isinstance(node, dict) else list(node)
        key = chance.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        mode = chance.random()
        if mode < 0.1:
            del copy[key]
        elif mode < 0.15 and isinstance(copy, dict):
            copy[chance.choice(["x", "\ud800", 7, None])] = copy.pop(key)
        elif mode < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = change(chance, copy[key])
        return tuple(copy) if isinstance(node, tuple) else copy
    if type(node) is torch.Tensor and node.layout == torch.strided and chance.random() < 0.5:
        flat = node.reshape(-1)
        return chance.choice([flat[:0], flat, node.double(), node * math.nan])
    return strange(chance)


def restructure(chance, raw, tree):
    """Change what the checkpoint holds, with checksums that are right."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        tree = change(chance, tree)
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def trap(chance, raw, tree):
    """Put code into it."""
    code = chance.choice(
        [
            Runs(open, "trace", "w"),
            Runs(os.system, "touch trace"),
            Runs(eval, "open('trace', 'w')"),
            Runs(getattr, "os", "system"),
            Runs(bytearray, 10**13),
            Runs(__import__, "antigravity"),
        ]
    )
    content = {**tree, chance.choice([*tree, "x"]): code}
    if chance.random() < 0.3:
        return pickle.dumps(content["x"] if "x" in content else code, protocol=2)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


MUTATIONS = [flip, cut, splice, repickle, repickle, restructure, restructure, restructure, trap]


@pytest.mark.filterwarnings("ignore")  # torch's, of the strangest files
@pytest.mark.parametrize("size", SIZES)
def test_mutated_checkpoints_are_refused_or_run(
    size, launcher, uninterrupted, tmp_path, monkeypatch, alarm
):
    """In this process: read, compare with the flags, restore, train to the end."""
    monkeypatch.chdir(tmp_path)
    script, argv = RUNS[0]
    assert launcher.run(script, argv, tmp_path, (50, "die")) == -signal.SIGKILL
    argv = [*argv, "--checkpoint_minutes", "9"]
    os.replace("r.ckpt.previous", "r.ckpt")
    raw, tree = Path("r.ckpt").read_bytes(), checkpoints.load_checkpoint(Path("r.ckpt"))
    monkeypatch.setattr(train, "describe_environment", dict)
    monkeypatch.setattr(train, "WandbLogger", NoTracker)
    n, outcomes = {"short": 100, "long": 6000}[size], Counter()
    for seed in range(n):
        chance = random.Random(seed)
        mutate = chance.choice(MUTATIONS)
        Path("r.ckpt").write_bytes(mutate(chance, raw, tree))
        Path("r.ckpt.previous").unlink(missing_ok=True)
        alarm()
        code, error = run_here(script, [*argv, "--resume", *["--override"] * (seed % 2)])
        lines = error.splitlines()
        assert code in (0, 1) and "Traceback" not in error, f"{seed} {mutate}\n{error}"
        assert sum("error:" in line for line in lines) == code, (seed, mutate, lines)
        assert not Path("trace").exists(), (seed, mutate)
        if mutate in (flip, cut, splice) and code == 0:  # in bytes that mean nothing
            assert result(tmp_path) == uninterrupted[0][0], (seed, mutate)
        outcomes[f"{mutate.__name__} {('accepted', 'refused')[code]}"] += 1
    print(
        f"\nmutated checkpoints: {n}, 0 crashes, 0 hangs, 0 times code was run; "
        f"{dict(sorted(outcomes.items()))}"
    )


@pytest.mark.parametrize("size", SIZES)
def test_mutated_command_lines_are_refused_in_one_line(size, monkeypatch, tmp_path, alarm):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda *_: None)
    values = [
        "",
        "0",
        "1",
        "-1",
        "2.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        str(2**63),
        "9" * 400,
        "9" * 5000,
        "٣",
        "x",
        "r",
        "/",
        "..",
        "a/b",
        "x" * 300,
        "é\n",
        "\udcff",
        "none",
        "L2Grad",
        "l1grad",
        "L0Grad",
        "L-1Grad",
        "L" + "9" * 400 + "Grad",
        "Variance",
        "VarianceNorm",
        "cpu",
        "cuda:99",
        "meta",
        "cpu:7",
        "0:none",
        "1:L2Grad=1",
        "1:=",
        "0:L1Grad@weights=1+VarianceNorm=1",
        "3:VarianceNorm=-1",
        "--",
        "-",
        "=",
        "@",
        "%s",
        "%(prog)s",
        "{}",
        "\x1b[2J",
        "CIFAR10",
        "synthetic",
        "bf16",
        "FP32",
        "CE",
        "tiny",
    ]
    parsers = {"train.py": train, "combined_protocol.py": combined_protocol}
    flags = {
        name: list(module.make_parser()._option_string_actions) for name, module in parsers.items()
    }
    n, codes = {"short": 300, "long": 4000}[size], Counter()
    for seed in range(n):
        chance = random.Random(seed)
        script = chance.choice(list(flags))
        argv = []
        for _ in range(chance.randrange(1, 6)):
            flag = chance.choice(flags[script])
            if chance.random() < 0.1:
                flag = flag[: chance.randrange(len(flag))] + chance.choice("-=x é")
            argv += [flag] + chance.choices(values, k=chance.choice([0, 1, 1, 1, 1, 2]))
        alarm()
        code, error = run_here(script, argv)
        assert code in (0, 1, 2) and "Traceback" not in error, (seed, argv, error)
        if code:
            assert error.count("\n") == 1 and "error:" in error, (seed, argv, error)
        codes[code] += 1
    print(f"\nmutated command lines: {n}, 0 crashes, 0 hangs; exit codes {dict(codes)}")


# --- the logger -------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """As much of a Weights & Biases server as a run needs; it may hang instead."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server = self.server
        if "graphql" in self.path:
            asked = json.loads(body)
            if "upsertBucket" in asked["query"]:
                server.run_ids.add(asked["variables"]["name"])
        if "file_stream" in self.path:
            server.n_streams += 1
        if server.n_streams >= server.hangs_after:
            server.over.wait()
            return
        content = json.dumps({"data": self.data(asked)} if "graphql" in self.path else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def data(self, asked):
        given = asked["variables"] if asked.get("variables") else {}
        if "upsertBucket" in asked["query"]:
            project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "me"}}
            return {
                "upsertBucket": {
                    "inserted": True,
                    "bucket": {
                        "id": "r",
                        "name": given["name"],
                        "displayName": given["displayName"],
                        "description": "",
                        "config": "{}",
                        "sweepName": None,
                        "historyLineCount": 0,
                        "project": project,
                    },
                }
            }
        if "createRunFiles" in asked["query"]:
            url = f"http://127.0.0.1:{self.server.server_port}/file"
            return {
                "createRunFiles": {
                    "runID": "r",
                    "uploadHeaders": [],
                    "files": [{"name": name, "uploadUrl": url} for name in given["files"]],
                }
            }
        if "CreateArtifact " in asked["query"]:
            wanted = given["input"]
            name = wanted["artifactCollectionName"]
            state = "COMMITTED" if name in self.server.made_by else "PENDING"
            self.server.made_by.setdefault(name, wanted["runName"])
            artifact = {"id": name, "state": state, "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "createArtifactManifest" in asked["query"]:
            upload = {"uploadUrl": f"http://127.0.0.1:{self.server.server_port}/m"}
            manifest = {"id": "m", "file": {**upload, "uploadHeaders": []}}
            return {"createArtifactManifest": {"artifactManifest": manifest}}
        if "createArtifactFiles" in asked["query"]:
            return {"createArtifactFiles": {"files": {"edges": []}}}
        if "useArtifact(" in asked["query"]:
            wanted = given["input"]
            self.server.uses.append((wanted["runName"], wanted["artifactID"]))
            return {"useArtifact": {"artifact": {"id": wanted["artifactID"]}}}
        return {"serverInfo": {"features": []}, "model": None, "entity": None, "project": None}

    do_GET = do_POST = do_PUT = answer


@pytest.fixture
def server():
    """A server on loopback that hangs from its hangs_after-th message of history on."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that gives up is no error here
    server.run_ids, server.n_streams, server.hangs_after = set(), 0, math.inf
    server.made_by, server.uses = {}, []  # artifacts: the run that logged each, and (run, artifact)
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def train_online(port, folder, *flags):
    """Return the finished process and its seconds; every wait for the logger is 3 s there."""
    started_at = time.monotonic()
    completed = subprocess.run(
        [sys.executable, tiny_scripts.__file__, "train.py", *FAST, *flags],
        cwd=folder,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
        env={
            **os.environ,
            "WANDB_MODE": "online",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert completed.returncode == 0 and "Traceback" not in completed.stderr, completed.stderr
    return completed, time.monotonic() - started_at


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault", ["answers", "refuses", "hangs from the start", "hangs later", "dies"]
)
def test_a_logger_never_hurts_the_run(fault, server, tmp_path, uninterrupted):
    port, flags = server.server_port, RUNS[0][1][len(FAST) :]
    if fault == "refuses":
        port = 9
    server.hangs_after = {"hangs from the start": 0, "hangs later": 1}.get(fault, math.inf)
    if fault == "dies":

        def die():
            while not server.n_streams:
                time.sleep(0.01)
            server.shutdown()
            server.socket.close()

        threading.Thread(target=die, daemon=True).start()
    completed, seconds = train_online(port, tmp_path, *flags)
    assert seconds < 90
    assert result(tmp_path) == uninterrupted[0][0]
    print(f"\na logger that {fault}: {seconds:.0f} s, the run is whole")
    if fault == "answers":
        assert "dashboard: http://" in completed.stdout
        return
    assert "wandb sync wandb" in completed.stdout
    [record] = tmp_path.glob(
        "wandb/run-*/*.wandb" if fault in ("hangs later", "dies") else "wandb/offline-*/*.wandb"
    )
    assert record.stat().st_size > 1000


@pytest.mark.faults
def test_a_resumed_run_is_the_same_run_for_the_logger(server, tmp_path):
    for flags in (["--n_epochs", "2"], ["--n_epochs", "4", "--resume", "--override"]):
        train_online(server.server_port, tmp_path, *flags)
    assert len(server.run_ids) == 1
    completed, _ = train_online(9, tmp_path, "--n_epochs", "6", "--resume", "--override")
    [run_id] = server.run_ids
    assert f"-{run_id}" in completed.stdout and list(tmp_path.glob(f"wandb/offline-run-*-{run_id}"))


@pytest.mark.faults
def test_offline_runs_are_linked_by_their_weights_once_they_are_uploaded(server, tmp_path):
    """A training's weights are its output and the quantization's input, for wandb's own upload."""
    env = {**os.environ, "WANDB_DATA_DIR": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    online = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}

    def call(*command, **changes):
        completed = subprocess.run(
            command, cwd=tmp_path, text=True, capture_output=True, timeout=200, env=env | changes
        )
        assert completed.returncode == 0, completed.stderr
        return completed

    script = (sys.executable, tiny_scripts.__file__)
    call(*script, "train.py", *FAST, "--n_epochs", "1", "--log_model", WANDB_MODE="offline")
    common = ("--model", "Tiny", "--dataset", "Tiny", "--bits", "4", "--schemes", "uniform")
    call(*script, "quant_inference.py", "r.pt", *common, "--no_plots", WANDB_MODE="offline")
    trained = json.loads((tmp_path / "r.json").read_text())
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"), key=lambda path: path.name)
    assert trained["run_id"] in first.name
    for folder in (first, second):
        call(sys.executable, "-m", "wandb", "sync", folder, **online)
    name, quantized = trained["artifact"]["name"], second.name.rpartition("-")[2]
    assert server.made_by[name] == trained["run_id"] and server.uses == [(quantized, name)]
