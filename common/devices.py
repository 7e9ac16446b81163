"""Chooses device and dtype of a run."""

import importlib.util
import os
import re
import shutil
import sys
import warnings

import torch


def pick_device(name: str) -> torch.device:
    """The device of this rank for --device `name`: auto, cuda, cuda:N, mps or cpu.

    Raises ValueError if the device is missing or cannot serve this number of ranks.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", name):
        raise ValueError(f"--device {name}: expected auto, cuda, cuda:1, mps or cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch sees no CUDA device; try --device auto")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        count = torch.cuda.device_count()
        if ranks > count:
            better = f"--nproc_per_node {count}" if count > 1 else "python instead of torchrun"
            raise ValueError(
                f"--nproc_per_node {ranks}: each process needs a CUDA device, and PyTorch sees {count}.\n"
                f"Type {better}, or add --device cpu"
            )
        if ranks > 1 and ":" in name:
            raise ValueError(f"--device {name}: {ranks} processes cannot share it; type --device cuda")
        if device.index >= count:
            raise ValueError(f"--device {name}: no {device} here, PyTorch sees {count} devices")
        torch.cuda.set_device(device)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: PyTorch sees no Apple GPU; try --device auto")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"--nproc_per_node {ranks}: an Apple GPU (mps) trains in one process.\n"
                "Type python instead of torchrun, or add --device cpu"
            )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype for --dtype `name`; float32 means no autocast."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float16
    return torch.float32  # most CPUs emulate bfloat16, slower than float32


def cpu_has(*instructions: str) -> bool:
    """Whether this CPU has any of them. With "avx512_bf16" or "amx_bf16", bfloat16 takes half the time of float32 or
    less."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in instructions)


def bfloat16_would_help(name: str, device: torch.device, width: int) -> bool:
    """Whether --dtype bfloat16, in place of `name`, would about halve the time of a model of this hidden_size."""
    return name == "auto" and device.type == "cpu" and width >= 256 and cpu_has("avx512_bf16", "amx_bf16")


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if something that torch.compile needs on this device is missing."""
    cxx = os.environ.get("CXX", {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++"))
    if device.type == "cpu" and not shutil.which(cxx):
        raise ValueError(f"--compile: needs a C++ compiler on a CPU, but {cxx} was not found (apt install g++)")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("--compile: needs Triton on a GPU (pip install triton; on Windows triton-windows)")


def make_deterministic(seed: int) -> None:
    """The same seed gives the same run on the same hardware; call it before the first CUDA operation.

    The exception is the gradient of attention on a GPU: with warn_only, PyTorch keeps its fast sums, whose order
    varies. The warning about this is silenced.
    """
    warnings.filterwarnings("ignore", message=".* defaults to a non-deterministic algorithm")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.manual_seed(seed % 2**63)
