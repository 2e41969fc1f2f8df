"""Faults, injected: a short round in `make test`, the long one, with counts, in `make faults`."""

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fork_server
import numpy as np
import pytest
import tiny_scripts
import torch
from tiny_runs import (
    FAST,
    RUNS,
    SIZES,
    assert_resumes,
    read_log,
    result,
    signals_line,
    survive_signals,
    survives_broken_write,
)
from tiny_scripts import break_write, turn_clock

from engine.images import file_loader
from engine.system.errors import DataError
from engine.training import checkpoints

# --- signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.faults)],
)
def test_a_run_survives_a_signal_at_any_moment(number, size, launcher, uninterrupted, tmp_path):
    chance, moments = random.Random(number), Counter()
    n_moments = {"short": 1, "long": 15}[size]
    for which, (run, (expected, seconds)) in enumerate(zip(RUNS, uninterrupted, strict=True)):
        folder = tmp_path / str(which)
        moments += survive_signals(
            launcher, run, expected, seconds, number, n_moments, folder, chance
        )
    print(signals_line(number, moments))


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
@pytest.mark.parametrize(
    "mode", ["fail", "read-only", pytest.param("die", marks=pytest.mark.faults)]
)
def test_a_run_survives_every_write_that_breaks(mode, size, launcher, uninterrupted, tmp_path):
    codes = []
    for number in range(1, 1000, {"short": 83, "long": 1}[size]):
        which = number % len(RUNS)
        expected, folder = uninterrupted[which][0], tmp_path / str(number)
        code = survives_broken_write(launcher, RUNS[which], expected, number, mode, folder)
        if code is None:
            break
        codes.append(code)
    assert len(codes) > 1
    print(
        f"\nwrites that {mode}: {len(codes)}, training went on after {codes.count(0)}, "
        "0 runs lost, 0 bits different"
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
    assert (
        launcher.run(script, argv, small_disk, partial(break_write, 60, "die")) == -signal.SIGKILL
    )
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
    assert_resumes(launcher, RUNS[0], small_disk, uninterrupted[0][0])


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


@pytest.mark.parametrize("hours", [-1, 24])
@pytest.mark.sampled(2)
def test_a_clock_that_jumps_changes_no_bit(hours, launcher, uninterrupted, tmp_path):
    for which, (run, (expected, _)) in enumerate(zip(RUNS, uninterrupted, strict=True)):
        folder = tmp_path / str(which)
        folder.mkdir()
        assert launcher.run(*run, folder, partial(turn_clock, hours)) == 0, read_log(folder)
        assert result(folder) == expected


# --- memory ----------------------------------------------------------------------------------


def train_with_little_memory(argv, cwd):
    """Train where the process may have 400 MB of addresses more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 400 * 10**6
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return tiny_scripts.run_logged("train.py", argv, cwd)


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no limit of addresses holds")
def test_memory_that_runs_out_is_one_line_and_resumed_from(tmp_path):
    flags = "--model ResNet20 --width 0.25 --dataset Synthetic --lr 0.01 --device cpu".split()
    flags += "--no-compile --run_name r --no_test_penalty --precision fp32 --n_epochs".split()
    few, many = ("--train_subset", "8", "--batch_size", "8"), ("--batch_size", "2000")
    fork = fork_server.launcher()

    def run(*argv):
        code = fork.wait(fork.start(train_with_little_memory, [*flags, *argv], tmp_path))
        return code, read_log(tmp_path)

    assert run("1", *few)[0] == 0
    code, log = run("2", *many, "--resume", "--allow_changed_settings")
    [line] = [line for line in log.splitlines() if "error:" in line]
    assert code == 1 and "Traceback" not in log, log
    assert "a smaller --batch_size" in line and "--resume continues" in line
    assert run("2", *few, "--resume")[0] == 0


class NoMemory:
    """Makes nothing: memory runs out in it, PyTorch's or numpy's."""

    def __init__(self, library):
        self.library = library

    def __call__(self, item):
        return self.library.empty(10**15)


@pytest.mark.parametrize("library", [torch, np])
@pytest.mark.parametrize("workers", [0, 1])
def test_memory_that_runs_out_in_a_worker_is_one_line(library, workers):
    with pytest.raises(DataError, match="memory ran out") as caught:
        next(file_loader.Workers(NoMemory(library), workers).map([0]))
    assert "\n" not in str(caught.value)


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
