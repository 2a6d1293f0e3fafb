"""Where and with what a result was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fused_losses as fl
from benchmarks.calls import rotation_bytes

PACKAGES = ("torch", "triton", "liger_kernel", "quack-kernels", "numpy")


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _environment() -> dict[str, str]:
    """What the environment says about threads and allocators."""
    names = (
        "OMP_NUM_THREADS",
        "OMP_PROC_BIND",
        "OMP_PLACES",
        "LD_PRELOAD",
        "GLIBC_TUNABLES",
        "PYTORCH_CUDA_ALLOC_CONF",
    )
    found = {name: os.environ[name] for name in names if name in os.environ}
    return found | {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}


def _allocator() -> str:
    set_by = [name for name in _environment() if name == "LD_PRELOAD" or name.startswith(("MALLOC_", "GLIBC_"))]
    return "default (glibc malloc)" if not set_by else f"set by {', '.join(set_by)}, see environment"


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, allocator, environment, commit, command; and how busy the machine was with other work."""
    about: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": _versions(),
        "build": fl.build_info(),
        "allocator": _allocator(),
        "environment": _environment(),
        "rotation_mb": rotation_bytes(device) >> 20,
        "torch_has_linear_cross_entropy": hasattr(torch.nn.functional, "linear_cross_entropy"),
        # A copy of the sources without git is told what it is a copy of.
        "commit": os.environ.get("FUSED_LOSSES_COMMIT") or _output("git", "describe", "--always", "--dirty"),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        about["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        about["cuda"] = torch.version.cuda
    return about
