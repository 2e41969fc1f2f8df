"""Whether element-wise kernels are compiled by torch.compile or run eagerly."""

import functools
import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

COMPILERS = {"cpu": ("c++", "g++"), "cuda": ("cc", "gcc", "clang")}  # that torch.compile calls
OPTIONS = {
    # What two sums share is computed twice: storing it would be a pass over memory, the bottleneck
    "realize_reads_threshold": 64
}
CPU_OPTIONS = {  # results/speed/LOG.md has what each one saves at the start
    "cpp.vec_isa_ok": True,  # what /proc/cpuinfo says of vector units is not tried out by compiling
    "pattern_matcher": False,  # there is no attention or matrix product to look for
}
WHOLE_STEP_OPTIONS = {  # by the type of the device, of a whole training step
    "cpu": {**CPU_OPTIONS, "fallback_random": True},
    # random numbers of PyTorch's own stream, and CUDA graphs as mode="reduce-overhead" has them
    "cuda": {"triton.cudagraphs": True, "fallback_random": True},
}
CPU_KERNEL_OPTIONS = {**CPU_OPTIONS, "compile_threads": 1}  # no worker processes for six functions
_compile_for: str | None = None  # type of the device whose kernels are compiled


def set_compile(enabled: bool, device: str = "cpu") -> bool:
    """Compile the kernels of this device from now on (True) or of none (False, as at import).

    Nothing is compiled before its first call; where that fails, all kernels run eagerly from then
    on, and one line says so. Returns what it is now: False also where the compiler that this device
    needs, or Triton for a GPU, is missing.
    """
    global _compile_for
    device_type = torch.device(device).type
    has_compiler = any(map(shutil.which, COMPILERS.get(device_type, ())))
    has_triton = device_type != "cuda" or importlib.util.find_spec("triton") is not None
    _compile_for = device_type if enabled and has_compiler and has_triton else None
    # without a GPU, torch.compile would warn of "No CUDA runtime" on every CPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return _compile_for is not None


@contextmanager
def eager_kernels() -> Iterator[None]:
    """Context manager in which no kernel is compiled."""
    global _compile_for
    before, _compile_for = _compile_for, None
    try:
        yield
    finally:
        _compile_for = before


def compiled(fn: Callable, on_cpu: bool = True) -> Callable:
    """Decorate a pure function of tensors: it runs compiled where `set_compile` says so.

    Its first argument is (N, C, S), or holds values per channel, (C) or (K, C). It is compiled once
    for any N and C, on a CPU also for any S, once for each memory format and pattern of dimensions
    of size 1. Keyword arguments are constants of the compilation. With on_cpu=False it always runs
    eagerly on a CPU, where it would not be worth a compilation.
    """

    @functools.cache
    def compile_once(constants, device, *key):
        def bound(*args):
            return fn(*args, **dict(constants))

        options = OPTIONS | (CPU_KERNEL_OPTIONS if device.type == "cpu" else {})
        return torch.compile(bound, options=options, isolate_recompiles=True)

    @functools.wraps(fn)
    def call(*args, **constants):
        global _compile_for
        x = args[0]
        device_type = x.device.type
        if device_type != _compile_for or (device_type == "cpu" and not on_cpu):
            return fn(*args, **constants)
        # with requires_grad it would compile once more for each pattern of True and False
        args = [t.detach() for t in args]
        for t in args:
            torch._dynamo.maybe_mark_dynamic(t, varying_dimensions(t))
        key = tuple(constants.items()), x.device, constant_layout(x), x.dtype
        try:
            return compile_once(*key)(*args)
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0]
            print(f"torch.compile failed, kernels run eagerly: {reason}", file=sys.stderr)
            _compile_for = None
            return fn(*args, **constants)

    call.is_compiled = True
    return call


def varying_dimensions(t: torch.Tensor) -> list[int]:
    """Return the dimensions of an argument whose sizes no compilation is for.

    N varies, as the last batch of an epoch is smaller. On a CPU, where a compilation for each shape
    would take minutes, all of (N, C, S) do.
    """
    if t.dim() < 3:
        return [t.dim() - 1]
    return [0, 1, 2] if t.device.type == "cpu" else [0]


def constant_layout(x: torch.Tensor) -> tuple:
    """Return what a compilation takes for granted of the shape and the strides of x."""
    if x.dim() < 3:
        return ()
    if x.device.type == "cpu":  # whether channels-last; PyTorch makes a size of 1 a constant
        return x.stride(1) == 1, *(n == 1 for n in x.shape)
    return x.shape[1:], x.stride(1)
