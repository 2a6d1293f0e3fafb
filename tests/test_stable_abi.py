"""The operator library needs nothing of torch but what stays the same from version to version."""

import ctypes
import re
import struct
from pathlib import Path

import pytest
import torch

import fused_losses
from fused_losses import functional as F

pytestmark = pytest.mark.any_cpu
LIBRARY = Path(fused_losses.__file__).parent / "libfused_losses_ops.so"

# torch's C functions; the second prefix are those added since 2.10.
STABLE = re.compile(r"(aoti_torch|torch)_\w+")
SYSTEM_LIBRARIES = ["libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1"]
# Libraries of their own in old C libraries.
SYSTEM_PARTS = {"libdl.so.2", "libpthread.so.0", "librt.so.1"}
# Weak symbols, resolved only where there is a profiler or transactional memory.
OPTIONAL = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
DYNAMIC, DYNSYM, NEEDED = 6, 11, 1


def sections(elf: bytes) -> list[tuple[int, bytes, int, int]]:
    """Type, content, linked section and size of an entry, of every section of a 64-bit ELF file."""
    start = struct.unpack_from("<Q", elf, 0x28)[0]
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(count)]
    return [(h[1], elf[h[4] : h[4] + h[5]], h[6], h[9]) for h in headers]


def text_at(strings: bytes, offset: int) -> str:
    return strings[offset : strings.index(b"\0", offset)].decode()


def entries(elf: bytes, kind: int, layout: str) -> list[tuple[tuple[int, ...], bytes]]:
    """The entries of the one section of that type, with the strings that they point into."""
    all_sections = sections(elf)
    content, linked = next((content, linked) for type_, content, linked, _ in all_sections if type_ == kind)
    return [(entry, all_sections[linked][1]) for entry in struct.iter_unpack(layout, content)]


def undefined_symbols(elf: bytes) -> list[str]:
    symbols = entries(elf, DYNSYM, "<IBBHQQ")[1:]
    return [text_at(strings, name) for (name, _, _, section, _, _), strings in symbols if section == 0]


def needed_libraries(elf: bytes) -> set[str]:
    return {text_at(strings, value) for (tag, value), strings in entries(elf, DYNAMIC, "<QQ") if tag == NEEDED}


def is_of_the_system(symbol: str) -> bool:
    return symbol in OPTIONAL or any(hasattr(ctypes.CDLL(name), symbol) for name in SYSTEM_LIBRARIES)


def test_undefined_symbols_are_torchs_stable_functions_or_the_systems():
    symbols = undefined_symbols(LIBRARY.read_bytes())
    of_torch = [s for s in symbols if STABLE.fullmatch(s)]
    assert {"aoti_torch_library_def", "torch_library_impl", "torch_parallel_for"} <= set(of_torch)
    assert [s for s in symbols if s not in of_torch and not is_of_the_system(s)] == []


def test_needs_no_library_of_torch_but_the_cpu_part():
    needed = needed_libraries(LIBRARY.read_bytes())
    loader = {name for name in needed if name.startswith("ld-linux")}
    assert needed - loader - set(SYSTEM_LIBRARIES) - SYSTEM_PARTS == {"libtorch_cpu.so"}


def test_minimum_is_the_version_that_was_targeted():
    minimum = fused_losses.build_info()["torch_minimum"]
    assert re.fullmatch(r"\d+\.\d+", minimum)
    assert tuple(map(int, minimum.split("."))) <= tuple(map(int, torch.__version__.split(".")[:2]))


# ---- Types and texts of errors on their way from C++ to Python ----

BAD_CALLS = {
    "class out of range": (IndexError, "Target 3 is out of bounds", {"target": torch.tensor([0, 3])}),
    "batch size": (ValueError, "to match target batch_size", {"target": torch.tensor([0])}),
    "dtype": (RuntimeError, "weight must be a floating point tensor", {"weight": torch.tensor([1, 2, 3])}),
}


def gce(logits, target=None, weight=None):
    target = torch.tensor([0, 1]) if target is None else target
    return F.gce_loss(logits, target, weight=weight)


def in_backward(logits, **arguments):
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad_output):
            return gce(logits, **arguments).expand(2, 3)

    Late.apply(torch.zeros(2, 3, requires_grad=True)).backward()


WAYS = {"eager": gce, "backward": in_backward}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mistake", BAD_CALLS)
def test_errors_keep_their_type_and_text(way, mistake):
    kind, text, arguments = BAD_CALLS[mistake]
    with pytest.raises(kind, match=text) as caught:
        WAYS[way](torch.zeros(2, 3), **arguments)
    assert caught.type is kind
    assert "API call failed" not in str(caught.value)


@pytest.mark.slow
def test_a_class_out_of_range_is_an_index_error_in_compiled_code(compile_backend="aot_eager"):
    compiled = torch.compile(gce, backend=compile_backend, fullgraph=True)
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        compiled(torch.zeros(2, 3), torch.tensor([0, 3]))
