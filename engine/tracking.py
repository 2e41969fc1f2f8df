"""Logging in Weights & Biases, which never stops a training."""

import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from torch import nn

from engine import distributed

INIT_SECONDS, LOG_SECONDS, FINISH_SECONDS = 30.0, 30.0, 60.0  # time limits of the logger


class WandbLogger:
    """A Weights & Biases run that never stops a training: after a failure it only warns."""

    exit_code = 0  # that the run ends with

    def __init__(
        self, project: str, entity: str | None, name: str, config: dict[str, Any], run_id: str
    ) -> None:
        """Start the run: WANDB_MODE where set, else online with a key and offline without one.

        A run_id that was used before continues that run. Of several processes rank 0 logs.
        """
        import wandb  # takes a second to import: only where a run starts

        self.wandb, self.run = wandb, None
        first_mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
        if distributed.get_rank():
            first_mode = "disabled"
        for mode in dict.fromkeys((first_mode, "offline", "disabled")):
            if mode == "online" and not has_key():  # wandb would ask for one
                warn("Weights & Biases, online: no key here; `wandb login` stores one")
                continue
            settings = wandb.Settings(
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                silent=True,
            )
            try:
                self.run = call_with_timeout(
                    2 * INIT_SECONDS,
                    wandb.init,
                    project=project,
                    entity=entity,
                    name=name,
                    config=config,
                    mode=mode,
                    id=run_id,
                    resume="allow",
                    settings=settings,
                )
                self.folder = Path(os.path.relpath(Path(self.run.dir).parent))
                break
            except Exception as error:  # whatever the logger raises, training continues
                warn(f"Weights & Biases, {mode}: {error}")
                self._attempt(2 * FINISH_SECONDS, wandb.teardown)  # else the id is still in use
        self.healthy = True  # so far
        if self.run:
            self._attempt(LOG_SECONDS, self.run.define_metric, "epoch", None, None, True)
            self.define("*", "epoch")

    def define(self, name: str, step: str) -> None:
        """Plot the values of that name against those of `step`."""
        if self.run is not None and self.healthy:
            self._attempt(LOG_SECONDS, self.run.define_metric, name, step)

    def log(self, values: dict[str, Any]) -> None:
        """Log values, "epoch" among them, which is the x axis."""
        if self.run is not None and self.healthy:
            self._attempt(LOG_SECONDS, self.run.log, values)

    def _attempt(self, seconds: float, call: Callable[..., Any], *arguments: Any) -> None:
        """Call with a time limit; where that fails, warn and log no more."""
        try:
            call_with_timeout(seconds, call, *arguments)
        except Exception as error:
            warn(f"Weights & Biases: {error or type(error).__name__}")
            self.healthy = False

    def log_histograms(self, net: nn.Module, epoch: float) -> None:
        """Log every parameter and its gradient under the names that wandb.watch uses."""
        if self.run is None or self.run.disabled:
            return
        histogram = self.wandb.Histogram
        values: dict[str, Any] = {"epoch": epoch}
        for name, p in net.named_parameters():
            values[f"parameters/{name}"] = histogram(p.detach().float().cpu().numpy())
            if p.grad is not None:  # None of a frozen parameter
                values[f"gradients/{name}"] = histogram(p.grad.float().cpu().numpy())
        self.log(values)

    def fail(self, error: BaseException) -> None:
        """Have the run end as failed or interrupted, with the reason in its summary."""
        code = getattr(error, "code", None)  # of SystemExit
        self.exit_code = code if isinstance(code, int) else 1
        reason = str(error).split("\n")[0]
        if self.exit_code > 128 or isinstance(error, KeyboardInterrupt):
            reason = f"interrupted {reason}"
        if self.run is not None and self.healthy:
            self._attempt(LOG_SECONDS, self.run.summary.update, {"failure": reason})

    def finish(self) -> str:
        """Close the run within a time limit; return lines that say how to open it."""
        if self.run is None or self.run.disabled:
            return "Weights & Biases: nothing logged"
        run = self.run
        self._attempt(2 * FINISH_SECONDS, run.finish, self.exit_code)
        self._attempt(2 * FINISH_SECONDS, self.wandb.teardown)  # else it waits at exit
        if self.healthy and not run.offline:
            return f"dashboard: {run.url}"
        parts = sorted(self.folder.parent.glob(f"*-{run.id}"))  # more than one after --resume
        return (
            f"dashboard, in this terminal: wandb leet {self.folder}\n"
            f"dashboard, in the browser:   wandb sync {' '.join(map(str, parts))}"
        )


def call_with_timeout(
    seconds: float, call: Callable[..., Any], *arguments: Any, **options: Any
) -> Any:
    """Call in a thread of its own and return the result; TimeoutError after `seconds`."""
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


def warn(message: object) -> None:
    """Print the first line of the message on stderr."""
    print(str(message).strip().split("\n")[0], file=sys.stderr)


def new_run_id() -> str:
    """Return an unused ID for a Weights & Biases run; in a sweep, the one that its agent gave."""
    return sweep_run_id() or uuid.uuid4().hex[:12]


def sweep_run_id() -> str:
    """Return the ID that a sweep's agent gave this run, "" outside a sweep."""
    return os.environ.get("WANDB_RUN_ID", "") if os.environ.get("WANDB_SWEEP_ID") else ""


def has_key() -> bool:
    """Tell whether Weights & Biases has credentials, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None
