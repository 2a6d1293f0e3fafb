"""Command line: ``python -m fused_losses info | demo``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

import fused_losses as fl
from fused_losses import demo

__all__ = ["info", "main"]

_KILLED_BY_SIGPIPE = 128 + 13  # the exit status of other programs whose reader has gone


def cuda_warning(built: str | None, running: str | None) -> str | None:
    """What may go wrong with kernels of one CUDA version beside a torch of another; None where nothing will.

    The library holds its own copy of the CUDA runtime, which needs a driver of at least its major version.
    """
    if built is None or running is None or built.split(".")[0] == running.split(".")[0]:
        return None
    return (
        f"compiled with CUDA {built}, but torch is for CUDA {running}: with a driver of CUDA {running} kernels of "
        f"CUDA {built} may fail at their first use. Build with an nvcc of CUDA {running.split('.')[0]}."
    )


def info() -> list[tuple[str, str]]:
    """Facts for a bug report, as (name, value): versions, build, devices, registered losses."""
    build = fl.build_info()
    warning = cuda_warning(build["cuda"], torch.version.cuda)
    built_for_cuda = f"CUDA {build['cuda']}" if build["cuda"] else "no CUDA"
    return [
        ("fused_losses", build["version"]),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch, running", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}"),
        ("torch, at build", build["torch"]),
        ("compiler", f"{build['compiler']}, {build['build_type']}"),
        ("built for", f"CPU ({', '.join(build['isa'])}), {built_for_cuda}"),
        ("CUDA architectures", ", ".join(build["cuda_architectures"]) or "none"),
        ("CPU instructions in use", torch.backends.cpu.get_cpu_capability()),
        ("threads", str(torch.get_num_threads())),
        ("devices", ", ".join(["cpu", *map(_cuda_device, range(torch.cuda.device_count()))])),
        ("losses", ", ".join(fl.loss_names())),
        *([("WARNING", warning)] if warning else []),
    ]


def _cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return (
        f"cuda:{index} {properties.name} (compute capability {properties.major}.{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB)"
    )


def _print_info(_: argparse.Namespace) -> int:
    for name, value in info():
        print(f"{name + ':':<25}{value}")
    return 0


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand with command-line arguments (``sys.argv`` by default); returns the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        # The reader, such as `head -1`, has gone. What is still in the buffer is thrown away; otherwise the interpreter
        # would try to write it at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _KILLED_BY_SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="python -m fused_losses", description="Noise-robust losses for PyTorch.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    info_parser = commands.add_parser("info", help="versions, devices and registered losses")
    info_parser.set_defaults(run=_print_info)
    demo_parser = commands.add_parser("demo", help="compare losses on digits with wrong labels")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
