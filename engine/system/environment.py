"""What a record says about the machine and the code that a result is from."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from engine.system import distributed

PACKAGES = ("torch", "torchvision", "numpy", "wandb")


def describe_environment() -> dict[str, Any]:
    """Return what decides a result besides the settings: command, commit, versions, machine."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        **describe_code(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": processor_name(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "processes": distributed.get_world_size(),
            "threads": torch.get_num_threads(),
            **describe_accelerator(),
        },
    }


def describe_accelerator() -> dict[str, Any]:
    """Return the accelerator's name, and versions of what it runs on; None where there is none."""
    if not torch.cuda.is_available():
        return {"accelerator": None}
    return {
        "accelerator": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "driver": torch._C._cuda_getDriverVersion(),  # the newest CUDA version that it takes
    }


def describe_code() -> dict[str, str | None]:
    """Return the commit of this code and what differs from it; None outside a repository."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": _git("rev-parse", "HEAD"), "git_uncommitted_changes": changes}


def _git(*arguments: str) -> str | None:
    """Return git's answer for the folder of this file, None where it is not in a repository."""
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).parent
    answer = subprocess.run([git, *arguments], cwd=folder, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else None


def processor_name() -> str:
    """Return the processor's model name where the system provides it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
