"""The tests once more, on the CPU kernels of every instruction set that this processor has and would not choose itself.

    python tests/instruction_sets.py NUMBER_OF_PROCESSES [arguments of pytest]

One after the other, each in so many processes, run all tests but those marked ``any_cpu``, which do not judge a kernel.
Files that are so marked as a whole are not even imported. The C++ tests run every instruction set by themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

# Values of ATEN_CPU_CAPABILITY, oldest first; torch reports them in capitals.
CAPABILITIES = ("default", "avx2", "avx512")


def others(own: str) -> tuple[str, ...]:
    """The instruction sets older than ``own``, as torch reports it; none on processors of other kinds, such as ARM."""
    return CAPABILITIES[: CAPABILITIES.index(own.lower())] if own.lower() in CAPABILITIES else ()


def files() -> list[str]:
    """The files with tests that judge a kernel."""
    marked = re.compile(r"^pytestmark = (\[\n(    .*\n)*?    )?pytest\.mark\.any_cpu", re.M)
    return [
        str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if not marked.search(path.read_text())
    ]


def main(arguments: list[str]) -> int:
    own = torch.backends.cpu.get_cpu_capability()
    if not others(own):
        print(f"instruction sets: skipped, torch has none older than {own}, which all tests use")
        return 0
    print(f"instruction sets: {', '.join(others(own))}, besides {own}, which all tests use", flush=True)
    processes, *rest = arguments
    chosen = [*files(), "-m", "not any_cpu and not long"]
    command = [sys.executable, "-m", "pytest", *chosen, "-n", processes, "--dist", "loadfile", *rest]
    statuses = [
        subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": name}).returncode for name in others(own)
    ]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
