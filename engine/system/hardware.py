"""What the hardware and the C library are asked: device, precision of convolutions, memory."""

import argparse
import ctypes
import platform
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engine.system import distributed

PRECISIONS = ("auto", "bf16", "fp32")
RandomState = tuple[Tensor, Tensor, tuple, tuple]  # PyTorch's CPU, the device, Python, NumPy
# of images, activations and weights of convolutions
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def default_device() -> str:
    """Return the name of the accelerator where there is one with float64, else "cpu".

    Apple's GPUs (mps) have none: nobody has tried them, so they have to be asked for.
    """
    return with_float64(accelerator() or torch.device("cpu")).type


def accelerator() -> torch.device | None:
    """Return the kind of GPU that there is, None where there is none."""
    return torch.accelerator.current_accelerator(check_available=True)


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of one that has no float64: Apple's GPUs."""
    return torch.device("cpu") if device.type == "mps" else device


def has_float64(device: str) -> bool:
    """Tell whether the device of that name has float64."""
    return with_float64(torch.device(device)) == torch.device(device)


def to_float64(t: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU where its device has none."""
    return t.to(with_float64(t.device), torch.float64)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that memory ran out: Python's, PyTorch's of a CPU or of a GPU."""
    said = ("out of memory", "DefaultCPUAllocator")  # by CUDA and MPS; by a CPU, a RuntimeError
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def print_device(device: str) -> None:
    """Print, on rank 0, the device that a run is on."""
    if distributed.get_rank() == 0:
        print(f"device: {device}", flush=True)


def parse_device(text: str) -> str:
    """Return the device's name if it is here, for "auto" the default device's: an argparse type.

    The device is not touched: each process of a run would hold memory of GPU 0.
    """
    text = text.lower()
    if text == "auto":
        return default_device()
    try:
        device = torch.device(text)
        n_devices = torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # not a device's name, or of a kind that is never there
        n_devices = 0
    if n_devices == 0 or (device.index or 0) >= n_devices:
        others = f" and {gpu.type}" if (gpu := accelerator()) else ""
        raise argparse.ArgumentTypeError(f"no device {text!r} here: there is cpu{others}")
    return text


def use_ieee_float32() -> None:
    """Have float32 mean IEEE float32 in this process: no TF32, which rounds factors to 10 bits."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions; True unless somebody says so


def choose_precision(precision: str, device: str) -> str:
    """Return "bf16" or "fp32"; of "auto", bfloat16 where the hardware is fast at it."""
    if precision != "auto":
        return precision
    if torch.device(device).type == "cpu":
        is_fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    else:
        is_fast = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] >= 8
    return "bf16" if is_fast else "fp32"


def resolve_precision(precision: str, device: str) -> torch.dtype:
    """Return the dtype of the convolutions, see `choose_precision`."""
    is_bf16 = choose_precision(precision, device) == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 convolutions, or none for other dtypes."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def seed_rng(seed: int, device: torch.device) -> None:
    """Seed the global random streams of the CPU and of the device, as torch.manual_seed does.

    Those of other devices, which cost time there, are left alone.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def get_rng_state(device: torch.device) -> RandomState:
    """Return the states of the random streams that a forward pass on the device may draw from."""
    module, arguments = _stream_of(device)
    of_device = module.get_rng_state(*arguments)
    return torch.get_rng_state(), of_device, random.getstate(), np.random.get_state()


def _set_rng_state(state: RandomState, device: torch.device) -> None:
    module, arguments = _stream_of(device)
    of_cpu, of_device, of_python, of_numpy = state
    torch.set_rng_state(of_cpu)
    module.set_rng_state(of_device, *arguments)
    random.setstate(of_python)
    np.random.set_state(of_numpy)


def _stream_of(device: torch.device) -> tuple[ModuleType, tuple[torch.device, ...]]:
    """Return the module with the device's stream, and what its functions take: which device."""
    if device.type == "cpu":
        return torch, ()
    return torch.get_device_module(device), () if device.type == "mps" else (device,)


@contextmanager
def rng_from(state: RandomState, device: torch.device) -> Iterator[None]:
    """Context manager in which the streams continue from `state`; after it, as before."""
    before = get_rng_state(device)
    _set_rng_state(state, device)
    try:
        yield
    finally:
        _set_rng_state(before, device)


def kept_streams(device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager after which the streams are as before it."""
    return rng_from(get_rng_state(device), device)


def tune_glibc_malloc() -> bool:
    """Have the C library reuse large freed blocks instead of returning them to the system.

    Each step takes and frees the same blocks, and a fresh one costs a page fault every 4 KB: a
    tenth of a step on two threads. Returns False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt, mmap_max, trim_threshold = ctypes.CDLL(None).mallopt, -4, -1  # as in malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
