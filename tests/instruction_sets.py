"""The tests once more, on the CPU kernels of every instruction set that this processor has and would not choose itself.

    python tests/instruction_sets.py [arguments of pytest]

A process for each, side by side, runs all tests but those marked ``any_cpu``, which reach no kernel. The C++ tests run
every instruction set by themselves.
"""

from __future__ import annotations

import sys

import pytest
import torch

# Values of ATEN_CPU_CAPABILITY, oldest first; torch reports them in capitals.
CAPABILITIES = ("default", "avx2", "avx512")


def others(own: str) -> tuple[str, ...]:
    """The instruction sets older than ``own``, as torch reports it; none on processors of other kinds, such as ARM."""
    return CAPABILITIES[: CAPABILITIES.index(own.lower())] if own.lower() in CAPABILITIES else ()


def main(arguments: list[str]) -> int:
    own = torch.backends.cpu.get_cpu_capability()
    if not others(own):
        print(f"instruction sets: skipped, torch has none older than {own}, which all tests use")
        return 0
    print(f"instruction sets: {', '.join(others(own))}, besides {own}, which all tests use", flush=True)
    processes = [f"--tx=id={name}//popen//env:ATEN_CPU_CAPABILITY={name}" for name in others(own)]
    return pytest.main(["-m", "not any_cpu and not long", "--dist", "each", *processes, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
