"""Rules of the C++ and CUDA sources that no compiler checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_cpu  # reads files
ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})

# Types that hold, or may hold, memory of torch's allocator.
OWNERS = re.compile(r"\b(\w*Tensor|TensorBase|TensorList|Storage|DataPtr|IValue|variable_list|Scratch|Sums)\b")
# Handles of operators: their types name tensors, they hold none.
HANDLES = re.compile(r"Operator<|RowLossWithStats|Dispatcher|TypedOperatorHandle|= find<")
# Constants without a value: an undefined tensor has no memory.
ABSENT = re.compile(r"(static |inline )*const [\w:]*Tensor \w+(\{\})?")

NO_VARIABLE = re.compile(r"(namespace|using|template|struct|class|enum|extern|return|typedef|private:|public:)")


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def lasting_variables(source: str) -> list[str]:
    """Declarations of variables that live as long as the process or its threads: static, thread_local, or outside of
    functions and classes (where nothing is indented)."""
    source = without_comments(source)
    found = []
    for match in re.finditer(r"(?m)^(?P<indent>[ \t]*)(?P<text>[\w:].*)", source):
        lasting = re.match(r"(inline\s+|const\s+)*(static|thread_local)\b", match["text"])
        if not lasting and match["indent"]:
            continue
        # Up to the end of a variable's declaration or the beginning of a function's body.
        text = source[match.start("text") :]
        end = re.search(r";|\)\s*(const\s*)?(noexcept\s*)?\{", text)
        if end is None or end[0] != ";":
            continue
        statement = " ".join(text[: end.start()].split())
        if not lasting and NO_VARIABLE.match(statement):
            continue
        if not lasting and "=" not in statement and statement.endswith(")"):  # a function that is defined elsewhere
            continue
        found.append(statement)
    return found


def kept_memory(source: str) -> list[str]:
    harmless = (HANDLES.search, ABSENT.fullmatch)
    return [t for t in lasting_variables(source) if OWNERS.search(t) and not any(match(t) for match in harmless)]


@pytest.mark.parametrize(
    "source",
    [
        "    static auto& of_stream = *new std::map<std::pair<int, cudaStream_t>, at::Tensor>;  // for ever",
        "    static at::Tensor ticket;",
        "    static std::vector<std::optional<Tensor>> cache(4);",
        "    static const Tensor empty = at::empty({0});",
        "thread_local std::unordered_map<int,\n    c10::Storage> known{};",
        "at::Tensor cache;",
        "std::map<int, torch::stable::Tensor> tickets = {};",
        "    thread_local Scratch scratch(device, {});",
        "    static Sums& sums = *new Sums(device);",
    ],
)
def test_a_kept_tensor_is_found(source: str) -> None:
    assert len(kept_memory(f"namespace x {{\n{source}\n}}\n")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "    static Tensor row_loss(A... a) {\n        return op(a...);\n    }",
        '    static const Operator<Tensor> op("fused_losses::row_loss");',
        "    // static Tensor in words;",
        "    static std::mutex mutex;",
        "    static std::map<std::pair<const void*, int>, Room> known;",
        "Tensor row_loss_by_reference(const RowLossArgs& args);",
        "    at::Tensor local = device.scratch(1, at::kInt);",
    ],
)
def test_what_keeps_no_tensor_is_left_alone(source: str) -> None:
    assert kept_memory(f"namespace x {{\n{source}\n}}\n") == []


# The first call may run inside a graph's memory pool (torch.compile with mode="reduce-overhead"), whose check then
# finds memory that nobody has returned.
def included(source: Path) -> set[Path]:
    """The source and all of ours that it includes."""
    names = re.findall(r'#include "([^"]+)"', source.read_text())
    files = [path for name in names if (path := ROOT / "csrc" / name).exists()]
    return {source}.union(*(included(path) for path in files))


def test_what_waits_for_the_launch_before_it_is_compiled_for_that() -> None:
    """In PTX for sm_80 there is no such instruction: those kernels would never overlap."""
    waits = re.compile(r"(wait_for_kernel_before|let_next_kernel_begin)\(\);")
    found = re.search(r'set\(for_hopper "(.+)"\)', (ROOT / "CMakeLists.txt").read_text())
    assert found is not None
    for_hopper, kernels = found[1].replace("\\\\", "\\"), [path for path in SOURCES if path.suffix == ".cu"]
    need_it = [path for path in kernels if any(waits.search(file.read_text()) for file in included(path))]
    assert need_it and [path for path in kernels if re.search(for_hopper, str(path))] == need_it


def test_nothing_of_torchs_allocator_outlives_a_call() -> None:
    assert len(SOURCES) > 50
    variables = {path: lasting_variables(path.read_text()) for path in SOURCES}
    assert sum(map(len, variables.values())) > 10  # the search finds variables at all
    kept = {str(path.relative_to(ROOT)): kept_memory(path.read_text()) for path in SOURCES}
    assert {name: found for name, found in kept.items() if found} == {}
