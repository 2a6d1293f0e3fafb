"""Which ways through a kernel are left where numbers that it is given are known."""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeAlias

from benchmarks.sass import Kernel

NUMBER = r"RZ|-?0x[0-9a-f]+|-?\d+"
COMPARISON = re.compile(rf"ISETP\.(NE|EQ|GT|GE|LT|LE)\.(?:U32\.)?AND (P\d), PT, (R\d+)(?:\.reuse)?, ({NUMBER}), PT")
IS_NOT_ZERO = re.compile(r"ISETP\.NE\.AND (P\d), PT, RZ, (UR\d+), PT")
LOADED = re.compile(r"U?LDC(?:\.U8)? (U?R\d+), (\S+)")
WRITTEN = re.compile(r"(?:@!?U?P\w+\s+)?[\w.]+\s+(U?R\d+|U?P\d)(?:, (U?P\d)\b)?")  # register or predicates
TAKEN = {
    "NE": operator.ne,
    "EQ": operator.eq,
    "GT": operator.gt,
    "GE": operator.ge,
    "LT": operator.lt,
    "LE": operator.le,
}

Facts: TypeAlias = set[tuple[str, int]]  # what registers and predicates are known to be


def knowing(kernel: Kernel, numbers: Mapping[str, int]) -> Kernel:
    """The same without the ways that are not taken if there are these numbers at places such as ``c[0x0][0x2b8]``.

    They are compared with others in registers that have been loaded from there.
    """
    come_from = defaultdict(set)
    for block, ways in kernel.to.items():
        for b in ways:
            come_from[b].add(block)
    after: dict[int, Facts] = {}  # when a block is left; not there: not known yet
    changed = True
    while changed:
        changed = False
        for block, texts in enumerate(kernel.blocks):
            before = [after[b] for b in come_from[block] if b in after]
            facts = facts_after(texts, numbers, set.intersection(*before) if before else set())
            changed |= after.get(block) != facts
            after[block] = facts
    to = {block: ways_of(kernel, block, dict(after[block])) for block in kernel.to}
    return Kernel(kernel.name, kernel.blocks, to)


def facts_after(texts: list[str], numbers: Mapping[str, int], before: Facts) -> Facts:
    """What is known after these instructions, where there are these numbers."""
    known = dict(before)
    for text in texts:
        compared = COMPARISON.match(text)
        if compared and compared[3] in known:
            known[compared[2]] = TAKEN[compared[1]](known[compared[3]], int(compared[4].replace("RZ", "0"), 0))
        elif (asked := IS_NOT_ZERO.match(text)) and asked[2] in known:
            known[asked[1]] = known[asked[2]] != 0
        elif written := WRITTEN.match(text):
            for name in (*written.groups(), *neighbours(text, written[1])):
                known.pop(name, None)
            if (loaded := LOADED.fullmatch(text)) and loaded[2] in numbers:
                known[loaded[1]] = numbers[loaded[2]]
    return set(known.items())


def neighbours(text: str, register: str) -> list[str]:
    """The registers that an instruction may write beside the first: two of 64 bits, four of 128."""
    is_wide = re.search(r"64|128|WIDE|CS2R|^(@!?U?P\w+\s+)?D(ADD|MUL|FMA)", text.split(",")[0])
    found = re.fullmatch(r"(U?R)(\d+)", register)
    return [f"{found[1]}{int(found[2]) + i}" for i in (1, 2, 3)] if is_wide and found else []


def ways_of(kernel: Kernel, block: int, known: Mapping[str, int]) -> set[int]:
    """Where a block may go on: all ways, unless it ends with a test of a predicate that is known."""
    texts, ways = kernel.blocks[block], kernel.to[block]
    found = re.match(r"@(!?)(P\d) +BRA", texts[-1]) if texts else None
    if not found or found[2] not in known or block + 1 not in ways or len(ways) != 2:
        return ways
    return ways - {block + 1} if known[found[2]] != bool(found[1]) else {block + 1}
