"""README and docs/: every Python block runs, what they name exists, and the site builds without a warning."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._functorch.config

import fused_losses as fl
from fused_losses.integrations import huggingface, mmengine, timm
from fused_losses.parallel import ClassParallel, sum_gradient

pytestmark = pytest.mark.any_cpu

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in [*PAGES, ROOT / "CONTRIBUTING.md"]}
# The line above a block, if there is one, names packages, or things in this one, without which it is left out.
_BLOCK = re.compile(r"^(?:<!-- needs: (?P<needs>[\w., ]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(text: str, language: str) -> list[tuple[int, str | None, str]]:
    """Line number, what it needs, and code of every block."""
    found = [match for match in _BLOCK.finditer(text) if match["language"] == language]
    return [(text.count("\n", 0, match.start("code")), match["needs"], match["code"]) for match in found]


def are_there(names: str) -> bool:
    try:
        for name in names.split(", "):
            pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    with torch.random.fork_rng(), torch._functorch.config.patch(enable_autograd_cache=True):
        torch.manual_seed(0)
        for line, needs, code in blocks(TEXTS[name], "python"):
            if needs is None or are_there(needs):
                with monkeypatch.context() as patch:
                    if is_for_torchrun(code):  # here of one process
                        for variable, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}.items():
                            patch.setenv(variable, str(value))
                        patch.setenv("MASTER_ADDR", "localhost")
                    exec(compile("\n" * line + code, name, "exec"), namespace)


def is_for_torchrun(code: str) -> bool:
    return "init_process_group(" in code


@pytest.mark.long
def test_torchrun_runs_the_blocks_for_it(tmp_path):
    pages = [text for text in TEXTS.values() if "init_process_group(" in text]
    found = [code for text in pages for _, _, code in blocks(text, "python") if is_for_torchrun(code)]
    assert len(found) == 4
    script = tmp_path / "block.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for code in found:  # one at a time: torch joins processes of torchrun once
        script.write_text(code + "print('through')\n")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        # Under gloo torch 2.14 aborts now and then as processes end that have done everything, without us, too.
        ended = done.returncode == 0 or "terminate called without an active exception" in done.stderr
        assert ended and done.stdout.count("through") == 2, done.stderr


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- needs: no.such -->\n```python\ny = 2\n```\n"
    assert blocks(text, "python") == [(2, None, "x = 1\n"), (6, "no.such", "y = 2\n")]
    assert are_there("fused_losses.reference, torch")
    assert not are_there("no.such") and not are_there("torch, fused_losses.no_such")


def test_commands_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    commands = {(name, code) for name, text in TEXTS.items() for _, _, code in blocks(text, "")}
    commands |= {(name, code) for name, text in TEXTS.items() for code in re.findall(r"`([^`\n]+)`", text)}
    missing = []
    for name, code in commands:
        for kind, what in re.findall(r"\b(make|python -m|python) ([\w./-]+)", code):
            there = {
                "make": lambda what=what: what in targets,
                "python -m": lambda what=what: importlib.util.find_spec(what) is not None,
                "python": lambda what=what: what == "-m" or (ROOT / what).is_file(),
            }[kind]
            if not there():
                missing.append((name, f"{kind} {what}"))
    assert missing == []


def test_files_named_exist():
    folders = "benchmarks|csrc|docs|examples|fused_losses|tests"
    path_in = re.compile(rf"(?:`|\]\()((?:{folders})/[\w./-]+)[`)#]")
    named = {(name, path) for name, text in TEXTS.items() for path in path_in.findall(text)}
    assert ("README.md", "docs/choosing.md") in named
    assert [(name, path) for name, path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_loss_is_listed():
    modules = [entry.module.__name__ for entry in fl.LOSSES.values()]
    assert [module for module in modules if not re.search(rf"\b{module}\b", TEXTS["docs/losses.md"])] == []


def test_losses_that_take_no_probabilities_are_listed():
    sentence = re.search(r"Targets may be class probabilities.*?ZErrorCrossEntropyLoss", TEXTS["docs/losses.md"], re.S)
    named = set(re.findall(r"`(\w+)`", sentence[0]))
    assert named == {entry.module.__name__ for entry in fl.LOSSES.values() if not entry.takes_probabilities}


def public_things() -> dict[str, object]:
    """Functions and classes that users import, by the name of where they are defined."""
    parallel = {"ClassParallel": ClassParallel, "sum_gradient": sum_gradient}
    spaces = [fl, fl.functional, fl.calibration, fl.cutoffs, fl.diagnostics, fl.noise, fl.schedules, fl.scores]
    found = [getattr(space, name) for space in [*spaces, huggingface, mmengine, timm] for name in space.__all__]
    things = [thing for thing in [*found, *parallel.values()] if inspect.isfunction(thing) or inspect.isclass(thing)]
    return {f"{thing.__module__}.{thing.__qualname__}": thing for thing in things}


THINGS = public_things()


@pytest.mark.parametrize("name", [name for name, thing in THINGS.items() if ">>>" in (inspect.getdoc(thing) or "")])
def test_docstring_examples(name):
    names = {"torch": torch, "nn": torch.nn, "np": np, "fl": fl, "noise": fl.noise}
    names |= {public: getattr(fl.functional, public) for public in fl.functional.__all__}
    names |= {public.rpartition(".")[2]: thing for public, thing in THINGS.items()}
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(THINGS[name]), names, name, None, None)
    with torch.random.fork_rng():
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples).failed == 0


def test_functions_have_examples():
    assert [name for name in fl.functional.__all__ if ">>>" not in getattr(fl.functional, name).__doc__] == []


@pytest.mark.parametrize("name", THINGS)
def test_every_argument_is_documented(name):
    thing = THINGS[name]
    doc = inspect.getdoc(thing) or ""
    if issubclass(thing, tuple) if inspect.isclass(thing) else name.endswith("_matrix"):
        return  # fields have docstrings of their own, or another function's
    arguments, _, _ = doc.partition("\nArgs:\n")[2].partition("\n\n")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"^ {4}(\S[^:]*):", arguments, re.M))))
    given = {p for p in inspect.signature(thing).parameters if p != "options"}
    given -= {"std", "count", "mean"} if thing is fl.ClassStatistics else set()
    assert given - named == set()
    assert named - given - {"options"} == set()


LISTED = re.findall(r"`(\w+)\(([^`]*)\)`", "".join(re.findall(r"^\| (`.*?`) \|", TEXTS["docs/losses.md"], re.M)))


@pytest.mark.parametrize(("name", "arguments"), LISTED)
def test_defaults_are_those_of_the_list_of_losses(name, arguments):
    defaults = inspect.signature(getattr(fl, name)).parameters
    for option, value in re.findall(r"(\w+)=([^,]+)", arguments):
        right, default = ast.literal_eval(value), defaults[option].default
        assert default == right if isinstance(right, str) else default == pytest.approx(right, rel=1e-3), option


OF_FUNCTIONS = {entry.module: entry.function for entry in fl.LOSSES.values()}
OF_FUNCTIONS |= {
    fl.ZMSELoss: fl.functional.z_mse_loss,
    fl.ZErrorBCEWithLogitsLoss: fl.functional.z_error_bce_with_logits,
}
OF_FUNCTIONS |= {
    fl.ZErrorCrossEntropyLoss: fl.functional.z_error_cross_entropy,
    fl.LinearLoss: fl.functional.linear_loss,
}


def test_running_statistics_have_one_momentum():
    parameters = [inspect.signature(thing).parameters for thing in THINGS.values() if inspect.isclass(thing)]
    assert [own["momentum"].default for own in parameters if "momentum" in own] == [0.1] * 6


@pytest.mark.parametrize("module", OF_FUNCTIONS)
def test_a_module_has_the_defaults_of_its_function(module):
    own, of_function = (inspect.signature(thing).parameters for thing in (module, OF_FUNCTIONS[module]))
    both = own.keys() & of_function.keys()
    assert {name: own[name].default for name in both} == {name: of_function[name].default for name in both}
    if module in (entry.module for entry in fl.LOSSES.values()):
        assert of_function.keys() - own.keys() == {"logits", "target", "sample_weight"} or module is fl.CrossEntropyLoss


def test_readme_is_read_in_two_minutes():
    assert len(TEXTS["README.md"].splitlines()) <= 130


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    for package in ("mkdocs", "mkdocstrings", "griffe"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    links = {
        link for page in tmp_path.rglob("*.html") for link in re.findall(r'(?:href|src)="([^"]*)"', page.read_text())
    }
    assert [link for link in links if re.match(r"(?!https?:).*(\.md\b|benchmarks/)", link)] == [], "out of the site"
    reference = (tmp_path / "api/losses/index.html").read_text()
    for entry in fl.LOSSES.values():
        assert f'id="fused_losses.functional.{entry.function.__name__}"' in reference
    modules = (tmp_path / "api/modules/index.html").read_text()
    for entry in fl.LOSSES.values():
        assert f'id="fused_losses.{entry.module.__name__}"' in modules
    pages = [page.read_text() for page in (tmp_path / "api").rglob("*.html")]
    described = [name.rpartition(".")[2] for page in pages for name in re.findall(r'id="fused_losses\.([\w.]+)"', page)]
    assert [thing.__name__ for thing in THINGS.values() if described.count(thing.__name__) != 1] == ["max_logit"]
    assert not {"LOSSES", "RowLossModule", "finite"} & set(described), "what a module imports"
