"""The record of a run: Weights & Biases, and the readable JSON beside the weights."""

import netrc
import os
import platform
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

import distributed

PACKAGES = ("torch", "torchvision", "numpy", "wandb")
INIT_SECONDS, LOG_SECONDS, FINISH_SECONDS = 30.0, 30.0, 60.0  # that the logger may take


class Tracker:
    """A Weights & Biases run that never stops a training: what fails is told once and left."""

    def __init__(
        self, project: str, entity: str | None, name: str, config: dict[str, Any], run_id: str
    ) -> None:
        """Start the run: WANDB_MODE where set, else online with a key and offline without one.

        A run_id that was used before continues that run. Of several processes rank 0 logs.
        """
        import wandb  # takes a second to import: only where a run starts

        self.wandb, self.run = wandb, None
        wanted = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if distributed.rank():
            wanted = "disabled"
        for mode in dict.fromkeys((wanted, "offline", "disabled")):
            if mode == "online" and not has_key():  # wandb would ask for one
                say("Weights & Biases, online: no key here; `wandb login` stores one")
                continue
            settings = wandb.Settings(
                init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True, silent=True,
            )
            try:
                self.run = within(
                    2 * INIT_SECONDS, wandb.init, project=project, entity=entity, name=name,
                    config=config, mode=mode, id=run_id, resume="allow", settings=settings,
                )
                self.folder = Path(os.path.relpath(Path(self.run.dir).parent))
                break
            except Exception as error:  # whatever the logger raises, the training goes on
                say(f"Weights & Biases, {mode}: {error}")
                self._attempt(2 * FINISH_SECONDS, wandb.teardown)  # else the id is still in use
        self.complete = True  # so far
        if self.run:
            self._attempt(LOG_SECONDS, self.run.define_metric, "epoch", None, None, True)
            self.define("*", "epoch")

    def define(self, name: str, step: str) -> None:
        """Draw the values of that name against those of `step`."""
        if self.run is not None and self.complete:
            self._attempt(LOG_SECONDS, self.run.define_metric, name, step)

    def log(self, values: dict[str, Any]) -> None:
        """Log values, "epoch" among them, which is the x axis."""
        if self.run is not None and self.complete:
            self._attempt(LOG_SECONDS, self.run.log, values)

    def _attempt(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Call in bounded time; where that fails, say so and log no more."""
        try:
            within(seconds, call, *arguments)
        except Exception as error:
            say(f"Weights & Biases: {error or type(error).__name__}")
            self.complete = False

    def log_histograms(self, net: nn.Module, epoch: float) -> None:
        """Log every parameter and its gradient under the names that wandb.watch uses."""
        if self.run is None or self.run.disabled:
            return
        histogram = self.wandb.Histogram
        values: dict[str, Any] = {"epoch": epoch}
        for name, p in net.named_parameters():
            values[f"parameters/{name}"] = histogram(p.detach().float().cpu().numpy())
            values[f"gradients/{name}"] = histogram(p.grad.float().cpu().numpy())
        self.log(values)

    def finish(self) -> str:
        """Close the run in bounded time; return the lines that say where it is, how to open it."""
        if self.run is None or self.run.disabled:
            return "Weights & Biases: nothing logged"
        run = self.run
        self._attempt(2 * FINISH_SECONDS, run.finish)
        self._attempt(2 * FINISH_SECONDS, self.wandb.teardown)  # else it waits at exit
        if self.complete and not run.offline:
            return f"dashboard: {run.url}"
        parts = sorted(self.folder.parent.glob(f"*-{run.id}"))  # more than one after --resume
        return f"dashboard, in this terminal: wandb leet {self.folder}\n" \
               f"dashboard, in the browser:   wandb sync {' '.join(map(str, parts))}"


def within(seconds: float, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call in a thread of its own and return what it does; TimeoutError where it takes longer."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(call(*arguments, **options))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer in {seconds:.0f} s") from error


def say(what: object) -> None:
    """Print the first line."""
    print(str(what).strip().split("\n")[0], file=sys.stderr)


def new_run_id() -> str:
    """Return a name for a Weights & Biases run that no other has; in a sweep, the one it gave."""
    return sweep_run_id() or uuid.uuid4().hex[:12]


def sweep_run_id() -> str:
    """Return the name that a sweep's agent gave this run, "" outside a sweep."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def has_key() -> bool:
    """Tell whether Weights & Biases has credentials here, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None


def describe_environment() -> dict[str, Any]:
    """Return what besides the settings decides the result: command, code, versions, machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git_commit": _git("rev-parse", "HEAD"),
        "git_uncommitted_changes": _git("status", "--porcelain", "--untracked-files=no"),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": _processor(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "processes": distributed.world_size(),
            "threads": torch.get_num_threads(),
            "accelerator": (
                torch.cuda.get_device_name() if torch.cuda.is_available() else None
            ),
        },
    }


def _git(*arguments: str) -> str | None:
    """Return what git says of the folder this file is in, None where it is not a checkout."""
    folder = Path(__file__).parent
    try:
        answer = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _processor() -> str:
    """Return the processor's model name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
