"""Reads PTX, the portable assembler that nvcc makes of kernels: as much of it as these kernels use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Type of a register or an instruction: its C++ type and bytes
TYPES = {
    f"{kind}{8 * size}": (f"{c}{8 * size}", size)
    for kind, c in (("u", "u"), ("s", "s"), ("b", "u"))
    for size in (1, 2, 4, 8)
}
TYPES |= {"f32": ("float", 4), "f64": ("double", 8), "pred": ("bool", 1)}

_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+) ([\w$]+)(?:\[(\d+)\])?")
_VARIABLE = re.compile(r"\.(shared|global|local|param) (?:\.align (\d+) )?\.(\w+) ([\w$]+)(?:\[(\d*)\])?(?: = (.*))?")
_FUNCTION = re.compile(r"\.(entry|func) (?:\((?P<result>[^)]*)\) ?)?(?P<name>[\w$]+) ?(?:\((?P<parameters>[^)]*)\))?")
_LINKAGE = re.compile(r"(?:\.(?:visible|weak|extern|common) )*")


@dataclass(frozen=True)
class Statement:
    """An instruction, a declaration, a label (with its colon), or a brace."""

    text: str
    line: int


@dataclass(frozen=True)
class Variable:
    space: str
    name: str
    size: int  # bytes; 0: dynamic shared memory
    align: int
    values: str | None = None


@dataclass
class Function:
    name: str
    is_entry: bool
    result: str | None
    parameters: list[str]
    body: list[Statement]


@dataclass
class Module:
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)


def split(operands: str) -> list[str]:
    """At commas that are not within brackets of any kind."""
    return [part.strip() for part in re.split(r",(?![^{\[(]*[}\])])", operands) if part.strip()]


def statements(text: str) -> Iterator[Statement]:
    """A brace within a statement belongs to it: a vector of registers, or a variable's values."""
    current, line = "", 1
    begin = 1
    for char in text:
        line += char == "\n"
        if not current.strip():
            begin = line
        alone = not current.strip() and char in "{}"
        label = char == ":" and re.fullmatch(r"\s*[$\w]+", current)
        body = char == "{" and re.match(r"\s*(\.(visible|weak) )*\.(entry|func)\b", current)
        if char == ";" or body:
            yield Statement(" ".join(current.split()), begin)
        elif label:
            yield Statement(current.strip() + ":", begin)
        if alone or body:
            yield Statement(char, line)
        current = "" if char == ";" or alone or label or body else current + char


def read_variable(text: str) -> Variable | None:
    """Of a declaration; None if it is none of a variable in memory."""
    found = _VARIABLE.fullmatch(text)
    if not found:
        return None
    space, align, kind, name, count, values = found.groups()
    size = TYPES[kind][1]
    return Variable(space, name, size * (1 if count is None else int(count or 0)), int(align or size), values)


def read_module(text: str) -> Module:
    """All of a file."""
    # Comments go and lines stay, as messages name them.
    text = re.sub(r"//[^\n]*", "", re.sub(r"^\.(version|target|address_size).*$", "", text, flags=re.MULTILINE))
    module = Module()
    depth = 0
    current: Function | None = None
    for statement in statements(text):
        if statement.text == "{":
            depth += 1
        elif statement.text == "}":
            depth -= 1
        if depth > 0 and current:
            if (depth, statement.text) != (1, "{"):
                current.body.append(statement)
            continue
        declaration = statement.text[_LINKAGE.match(statement.text).end() :]  # type: ignore[union-attr]
        if variable := read_variable(declaration):
            module.variables[variable.name] = variable
        elif found := _FUNCTION.match(declaration):
            names = [
                [name for _, name, _ in _PARAMETER.findall(part or "")] for part in found.group("result", "parameters")
            ]
            current = Function(found["name"], found[1] == "entry", next(iter(names[0]), None), names[1], [])
            module.functions.append(current)
    module.functions = [function for function in module.functions if function.body]  # others are declared only
    return module
