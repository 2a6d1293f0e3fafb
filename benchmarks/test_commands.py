"""The commands say what they do: ``--help`` of each, in this process, since one each would take seconds for torch."""

from __future__ import annotations

import functools
import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parents[1]


def commands() -> list[tuple[str, ...]]:
    """What ``python -m`` runs here: files that ask whether they are the main one."""
    paths = [path for folder in ("benchmarks", "fused_losses") for path in sorted((ROOT / folder).rglob("*.py"))]
    main = [path for path in paths if '\nif __name__ == "__main__":' in path.read_text()]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in main]
    return [("-m", module) for module in modules] + [("-m", "fused_losses", name) for name in ("info", "demo")]


@functools.cache
def said_of_itself(*program: str) -> str:
    """The ``--help`` of a file, or of a module after ``-m``, and its subcommand."""
    said, (name, *subcommand) = io.StringIO(), program[1:] if program[0] == "-m" else program
    started = patch.object(sys, "argv", [name, *subcommand, "--help"])
    with redirect_stdout(said), started, pytest.raises(SystemExit) as caught:
        if program[0] == "-m":
            runpy.run_module(name, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert caught.value.code == 0
    return said.getvalue()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_command_helps(command: tuple[str, ...]) -> None:
    assert said_of_itself(*command).startswith("usage: ")
