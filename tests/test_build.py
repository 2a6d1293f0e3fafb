"""What was built, what is shipped, and what the build says when it cannot go on."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_losses
from fused_losses import _C, _ops

pytestmark = pytest.mark.any_cpu  # files and messages of the build
ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_build_info_describes_this_build():
    info = fused_losses.build_info()
    assert set(info) == {
        "version",
        "torch",
        "torch_minimum",
        "cuda",
        "cuda_architectures",
        "compiler",
        "isa",
        "build_type",
    }
    assert torch.torch_version.TorchVersion(info["torch"]) >= info["torch_minimum"]
    assert info["build_type"] in {"Release", "RelWithDebInfo", "Debug"}
    assert re.fullmatch(r"(GNU|Clang) \d+(\.\d+)+", info["compiler"])


def test_isa_list_matches_the_machine():
    x86 = platform.machine() in {"x86_64", "AMD64"}
    assert fused_losses.build_info()["isa"] == (["baseline", "avx2", "avx512"] if x86 else ["baseline"])


def test_cuda_entries_agree():
    info = fused_losses.build_info()
    if info["cuda"] is None:
        assert info["cuda_architectures"] == []
        return
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", info["cuda"])
    assert info["cuda_architectures"]
    for architecture in info["cuda_architectures"]:
        assert re.fullmatch(r"\d+[af]?(-real|-virtual)?", architecture)


def test_version_is_that_of_pyproject():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert fused_losses.build_info()["version"] == declared[1]


def test_extension_module_needs_no_torch():
    result = run_python(
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_C', {_C.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(module.build_info()['torch'], *module.loss_names())"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [fused_losses.build_info()["torch"], *fused_losses.loss_names()]


@pytest.mark.parametrize(
    ("version", "refused"), [("1.13.1", True), ("2.10.1+cu128", True), ("2.11.0", False), ("3.0.0a0+git123", False)]
)
def test_torch_must_be_new_enough(version, refused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    message = re.escape(f"fused_losses needs torch 2.11 or newer, but torch {version} is running")
    with pytest.raises(ImportError, match=message) if refused else contextlib.nullcontext():
        _ops._require_torch()


_EDITABLE = f"""
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {_C.__file__!r}) if name == "fused_losses._C" else None
sys.meta_path.append(Finder)
import fused_losses
"""


@pytest.mark.parametrize("how", [("-m", "fused_losses", "info"), ("-c", _EDITABLE)], ids=["installed", "editable"])
def test_sources_that_are_not_built_say_what_to_do(how, tmp_path):
    """As after ``pip install .`` inside of the clone, where Python finds the sources first; or in a second clone,
    where the finder of an editable installation of the first adds its binaries."""
    shutil.copytree(ROOT / "fused_losses", tmp_path / "fused_losses", ignore=shutil.ignore_patterns("*.so"))
    command = [sys.executable, "-S", *how]  # -S: without what is installed here
    environment = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"fused_losses in {tmp_path / 'fused_losses'} is not built for this Python" in done.stderr
    assert "start Python in another folder" in done.stderr and "circular" not in done.stderr


@pytest.mark.slow
def test_the_import_asks_for_it_and_takes_no_longer_than_torchs():
    result = run_python(
        "import sys, torch\n"
        "for version in ('2.10.1', '2.11.0'):\n"
        "    torch.__version__ = torch.torch_version.TorchVersion(version)\n"
        "    try:\n        import fused_losses\n"
        "    except ImportError as error:\n        print(error)\n"
        "print('fused_losses' in sys.modules, 'torch._dynamo' in sys.modules)"  # the compiler: seconds
    )
    refused = "fused_losses needs torch 2.11 or newer, but torch 2.10.1 is running"
    assert result.stdout.splitlines() == [refused, "True False"], result.stderr


def test_sdist_holds_every_source_and_no_binary(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    shipped = set((tmp_path / "fused_losses.egg-info" / "SOURCES.txt").read_text().splitlines())

    suffixes = {".cpp", ".h", ".cu", ".cuh", ".py", ".pyi", ".typed"}
    folders = [ROOT / name for name in ("csrc", "fused_losses", "tests")]
    sources = {str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*.*")}
    sources = {name for name in sources if Path(name).suffix in suffixes}
    assert {"csrc/bindings.cpp", "fused_losses/py.typed", "fused_losses/_C.pyi"} <= sources
    expected = sources | {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert expected - shipped == set()
    assert [name for name in shipped if name.endswith(".so")] == []


def test_build_without_torch_says_what_to_do():
    result = run_python(
        "import importlib.util, runpy, sys\n"
        "find_spec = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *args: None if name == 'torch' else find_spec(name, *args)\n"
        "sys.argv = ['setup.py', 'build_ext', '--inplace']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    assert result.returncode == 1
    assert "no torch" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr


@pytest.mark.parametrize("path", ["README.md", "setup.py"])
def test_what_to_install_before_a_build_is_all_it_asks_for(path):
    """With their versions: `pip install setuptools` keeps an old one, as Python 3.11 puts into new environments."""
    line = re.search(r"pip install torch .*", (ROOT / path).read_text())
    declared = re.search(r"^requires = \[(.+)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert line is not None and declared is not None
    assert set(re.findall(r'"(.+?)"', declared[1])) <= set(shlex.split(line[0]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FUSED_LOSSES_CUDA", "yes", "FUSED_LOSSES_CUDA must be 0, 1 or unset, got 'yes'"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;Hopper", "TORCH_CUDA_ARCH_LIST: 'Hopper' in '8.0;Hopper'"),
        ("TORCH_CUDA_ARCH_LIST", "7.5 9.0", "The CUDA kernels need sm_80 (A100) or newer, got 75-real"),
    ],
)
def test_bad_build_settings_are_named(tmp_path, name, value, message):
    if name == "TORCH_CUDA_ARCH_LIST" and fused_losses.build_info()["cuda"] is None:
        pytest.skip("read in CUDA builds only")
    environment = {**os.environ, "FUSED_LOSSES_CUDA": "", name: value}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("nvcc") is None, reason="needs cmake and nvcc")
@pytest.mark.parametrize("torch_cuda", ["11.8", None])
def test_the_build_warns_of_a_torch_for_another_cuda(tmp_path, torch_cuda):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if any('library_paths' in text for text in sys.orig_argv):\n"  # what CMakeLists.txt asks Python
        f"    import torch\n    torch.version.cuda = {torch_cuda!r}\n"
    )
    environment = {**os.environ, "FUSED_LOSSES_CUDA": "1", "PYTHONPATH": str(tmp_path)}
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DPython_EXECUTABLE={sys.executable}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert ("is for CUDA 11.8: with a driver of CUDA 11.8 the kernels may fail" in said) == (torch_cuda is not None)
