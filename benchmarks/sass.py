"""Machine code of CUDA kernels as a graph of basic blocks, and the cheapest way of a warp through one trip of a loop.

Reads what ``nvdisasm`` prints of a cubin (PyPI: nvidia-cuda-nvdisasm). No GPU is needed.
"""

from __future__ import annotations

import heapq
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,6}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L\w+|\$\S+):")
GUARD = re.compile(r"^@!?U?P\w+\s+")
ENDS_BLOCK = re.compile(r"^(@!?U?P\w+\s+)?(BRA|EXIT|RET|BSYNC|BRX|JMP|BREAK)\b")

CLASSES = {
    "FMA": "FFMA FADD FMUL FFMA32I FADD32I FMUL32I HFMA2 HADD2 HMUL2 IMAD",
    "MUFU": "MUFU F2F F2I I2F FRND POPC FLO",
    "LSU": "LD LDG LDS LDL ST STG STS STL SHFL ATOM ATOMG ATOMS RED LDGSTS LDC MATCH",
    "branch": "BRA BSSY BSYNC BREAK WARPSYNC EXIT CALL RET BRX JMP BAR",
    "FP64": "DADD DMUL DFMA DSETP",
}
CLASS_OF = {name: kind for kind, names in CLASSES.items() for name in names.split()}


@cache
def opcode(text: str) -> str:
    """``@P0 LDG.E.128 R4, ...`` -> ``LDG.E.128``."""
    return GUARD.sub("", text).split()[0]


def class_of(op: str) -> str:
    """The unit that executes it, as far as the report tells them apart."""
    return CLASS_OF.get(op.split(".")[0], "ALU")


@dataclass
class Kernel:
    """Basic blocks of one kernel, and where each may lead."""

    name: str
    blocks: list[list[str]] = field(default_factory=list)
    to: dict[int, set[int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Instructions of its code."""
        return sum(map(len, self.blocks))


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: what $NAME says, the toolkit's, else one that came with a Python package."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ[home]) / "bin" for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ]
    for package, inside in (
        ("triton", "backends/nvidia/bin"),
        ("nvidia", "cu13/bin"),
        ("nvidia", f"cuda_{name}/bin"),
    ):
        spec = importlib.util.find_spec(package)
        folders += [Path(place) / inside for place in (spec.submodule_search_locations or [])] if spec else []
    places = [os.environ.get(name.upper()), shutil.which(name)]
    places += [shutil.which(name, path=str(folder)) for folder in folders]
    return next((place for place in places if place), None)


def disassemble(cubin: Path, names: Collection[str]) -> list[Kernel]:
    """The kernels of a cubin with these names."""
    tool = find_tool("nvdisasm")
    assert tool is not None, "nvdisasm was not found (pip install nvidia-cuda-nvdisasm)"
    listing = subprocess.run([tool, str(cubin)], capture_output=True, text=True, check=True).stdout
    return parse(listing, names)


def names_in(cubin: Path) -> list[str]:
    """Of the kernels of a cubin."""
    return sorted({name.decode() for name in re.findall(rb"\.text\.(\w+)", cubin.read_bytes())})


def parse(listing: str, names: Collection[str] | None = None) -> list[Kernel]:
    """The kernels in what ``nvdisasm`` prints, or those with these names."""
    sections = re.split(r"^\.text\.(\S+):$", listing, flags=re.MULTILINE)
    return [
        graph_of(name, body)
        for name, body in zip(sections[1::2], sections[2::2], strict=True)
        if names is None or name in names
    ]


def graph_of(name: str, body: str) -> Kernel:
    """Splits code into basic blocks. A call counts as the one instruction, as most are of rare slow paths."""
    blocks: list[list[str]] = [[]]
    place_of: dict[str, int] = {}
    for line in body.splitlines():
        if label := LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            place_of[label[1]] = len(blocks) - 1
        elif found := INSTRUCTION.match(line):
            blocks[-1].append(found[1])
            if ENDS_BLOCK.match(found[1]):
                blocks.append([])
    return Kernel(name, blocks, edges_of(blocks, place_of))


def edges_of(blocks: list[list[str]], place_of: Mapping[str, int]) -> dict[int, set[int]]:
    """Where each block may go on. A BSYNC goes where the last BSSY of its barrier says."""
    to: dict[int, set[int]] = {i: set() for i in range(len(blocks))}
    meets_at: dict[str, int] = {}
    for i, block in enumerate(blocks):
        falls = True
        for text in block:
            op, always = opcode(text).split(".")[0], not text.startswith("@")
            target = re.search(r"`\((\.L\w+)\)", text)
            barrier = re.search(r"\bB\d+\b", text)
            if op == "BSSY" and target and barrier:
                meets_at[barrier[0]] = place_of[target[1]]
            elif op in ("BRA", "JMP") and target and "BRA.DIV" not in text:
                to[i].add(place_of[target[1]])
                falls &= not always
            elif op == "BSYNC" and barrier and barrier[0] in meets_at:
                to[i].add(meets_at[barrier[0]])
                falls &= not always
            elif op in ("EXIT", "RET", "BRX"):
                falls &= not always
        if falls and i + 1 < len(blocks):
            to[i].add(i + 1)
    return to


def order_of(to: Mapping[int, set[int]]) -> list[int]:
    """Blocks that can be reached, each before those it leads to but for loops."""
    order, seen = [], {0}
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(sorted(to[0])))]
    while stack:
        node, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(sorted(to[following]))))
    return order[::-1]


def dominators(come_from: Mapping[int, set[int]], order: list[int]) -> dict[int, int]:
    """The closest block that every way to a block leads through (Cooper, Harvey and Kennedy)."""
    rank = {block: i for i, block in enumerate(order)}
    closest = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new: int | None = None
            for other in come_from[block]:
                if other not in closest:
                    continue
                if new is None:
                    new = other
                    continue
                a, b = other, new
                while a != b:
                    while rank[a] > rank[b]:
                        a = closest[a]
                    while rank[b] > rank[a]:
                        b = closest[b]
                new = a
            if new is not None and closest.get(block) != new:
                closest[block] = new
                changed = True
    return closest


def loops(kernel: Kernel) -> dict[int, set[int]]:
    """Natural loops: first block -> all blocks."""
    order = order_of(kernel.to)
    come_from = defaultdict(set)
    for block in order:
        for b in kernel.to[block]:
            come_from[b].add(block)
    closest = dominators(come_from, order)

    def dominates(a: int, b: int) -> bool:
        while b not in (a, 0):
            b = closest[b]
        return a == b

    found: dict[int, set[int]] = {}
    for latch in order:
        for header in kernel.to[latch]:
            if not dominates(header, latch):
                continue
            members = found.setdefault(header, {header})
            todo = [latch]
            while todo:
                block = todo.pop()
                if block not in members:
                    members.add(block)
                    todo += come_from[block]
    return found


@cache
def amount(op: str, pattern: str) -> bool:
    """Whether an opcode is one of ``LDG.128|STS.!64``: all parts of an alternative, in any place; none that has a !."""
    parts = set(op.split("."))
    return any(
        all((part[1:] not in parts) if part.startswith("!") else (part in parts) for part in alternative.split("."))
        for alternative in pattern.split("|")
    )


def optional_part(kernel: Kernel, pattern: str) -> set[int]:
    """The blocks that a trip of the innermost loop around such an instruction may leave out, as a whole, with it."""
    around = [
        (len(members), header, members, block)
        for header, members in loops(kernel).items()
        for block in members
        if any(amount(opcode(text), pattern) for text in kernel.blocks[block])
    ]
    if not around:
        return set()
    _, header, members, marked = min(around)

    def reached(left_out: int) -> set[int]:
        found, todo = set[int](), [header]
        while todo:
            if (block := todo.pop()) not in found and block != left_out:
                found.add(block)
                todo += [b for b in kernel.to[block] if b in members and b != header]
        return found

    kept = [reached(block) for block in members - {header}]
    kept = [blocks for blocks in kept if marked not in blocks and any(header in kernel.to[b] for b in blocks)]
    return members - min(kept, key=len) if kept else set()


def cheapest_trip(
    kernel: Kernel, work: Mapping[str, int], *, outermost: bool = True, never: str | None = None
) -> list[str]:
    """The fewest instructions of one trip of the outermost loop in which every kind of instruction is met so often.

    ``work`` maps patterns of opcodes to numbers: so many exponentials, wide loads and stores as the rows of a trip
    need. Loops within the trip are entered as often as that takes. A search over (block, what is done so far). With
    ``outermost=False`` of the innermost such loop. Without the :func:`optional_part` of ``never``.
    """
    patterns, needed = list(work), tuple(work.values())
    done_by = [
        tuple(sum(amount(opcode(text), pattern) for text in block) for pattern in patterns) for block in kernel.blocks
    ]
    left_out = optional_part(kernel, never) if never else set()
    candidates = [
        (len(members), header, members - left_out)
        for header, members in loops(kernel).items()
        if all(any(done_by[b][k] for b in members) for k in range(len(patterns)))
    ]
    for _, header, members in sorted(candidates, reverse=outermost):
        path = cheapest_path(kernel, header, members, done_by, needed)
        if path:
            return [text for block in path for text in kernel.blocks[block]]
    raise ValueError(f"no loop of {kernel.name} does {dict(work)}")


def most_on_the_way(kernel: Kernel, header: int, members: set[int], done_by: list[int], needed: int) -> dict[int, int]:
    """How much a way from each block back to the loop's first one can do at most, as far as it is needed."""
    most = dict.fromkeys(members, 0)
    changed = True
    while changed:
        changed = False
        for block in sorted(members, reverse=True):
            further = max((most[b] for b in kernel.to[block] if b in members and b != header), default=0)
            new = min(needed, done_by[block] + further)
            changed |= new != most[block]
            most[block] = new
    return most


def cheapest_path(
    kernel: Kernel, header: int, members: set[int], done_by: list[tuple[int, ...]], needed: tuple[int, ...]
) -> list[int]:
    """Blocks from a loop's first one until back there, with the least instructions (Dijkstra); empty if none."""

    def after(done: tuple[int, ...], block: int) -> tuple[int, ...]:
        return tuple(min(n, d + more) for n, d, more in zip(needed, done, done_by[block], strict=True))

    within_reach = [most_on_the_way(kernel, header, members, [d[k] for d in done_by], n) for k, n in enumerate(needed)]
    start = (header, after((0,) * len(needed), header))
    best = {start: len(kernel.blocks[header])}
    via: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}
    heap = [(best[start], *start)]
    left: dict[int, list[tuple[int, ...]]] = defaultdict(list)  # what was done when a block was left, at less cost
    while heap:
        cost, block, done = heapq.heappop(heap)
        if cost > best[block, done] or any(all(map(int.__ge__, other, done)) for other in left[block]):
            continue
        left[block].append(done)
        for b in kernel.to[block]:
            if b == header and done == needed:
                state, path = (block, done), [block]
                while state in via:
                    state = via[state]
                    path.append(state[0])
                return path[::-1]
            if b not in members or b == header:
                continue
            state = (b, after(done, b))
            # Not by way of b if even all that is reachable from b would leave something needed undone.
            if any(d + reach[b] < n for d, reach, n in zip(done, within_reach, needed, strict=True)):
                continue
            total = cost + len(kernel.blocks[b])
            if total < best.get(state, 1 << 60):
                best[state], via[state] = total, (block, done)
                heapq.heappush(heap, (total, *state))
    return []


def per_class(texts: list[str]) -> Counter[str]:
    """Instructions by the unit that executes them."""
    return Counter(class_of(opcode(text)) for text in texts)
