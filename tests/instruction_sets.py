"""The tests once more, on the CPU kernels of every instruction set that this processor has and would not choose itself.

    python tests/instruction_sets.py NUMBER_OF_PROCESSES [--all] [arguments of pytest]

One after the other, each in so many processes, run all tests but those marked ``any_cpu``, which do not judge a kernel.
Files that are so marked as a whole are not even imported. Where there are two older instruction sets, each gets every
other file; both get all with ``--all``. The C++ tests run every instruction set by themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
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


def share(names: Sequence[str], paths: list[str]) -> dict[str, list[str]]:
    """The files that each instruction set gets: all get the one that asks which is in use."""
    asking = [path for path in paths if Path(path).name == "test_instruction_sets.py"]
    rest = [path for path in paths if path not in asking]
    return {name: asking + rest[i :: len(names)] for i, name in enumerate(names)}


def main(arguments: list[str]) -> int:
    own = torch.backends.cpu.get_cpu_capability()
    if not others(own):
        print(f"instruction sets: skipped, torch has none older than {own}, which all tests use")
        return 0
    print(f"instruction sets: {', '.join(others(own))}, besides {own}, which all tests use", flush=True)
    processes, *rest = arguments
    parts = share(others(own), files())
    if "--all" in rest:
        rest.remove("--all")
        parts = dict.fromkeys(others(own), files())
    options = ["-m", "not any_cpu and not long", "-n", processes, "--dist", "loadfile", *rest]
    statuses = [
        subprocess.run(
            [sys.executable, "-m", "pytest", *paths, *options], env={**os.environ, "ATEN_CPU_CAPABILITY": name}
        ).returncode
        for name, paths in parts.items()
    ]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
