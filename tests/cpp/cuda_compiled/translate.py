"""Makes C++ of PTX: functions that the emulation of CUDA can run in the place of the kernels' sources.

    translate.py FILE.ptx FOLDER PARTS

writes so many files FOLDER/FILE_0.cpp, ..., each with a part of the kernels, for compilers that run side by side.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from instructions import Body, identifier, translate
from ptx import TYPES, Function, Module, Variable, read_module, read_variable, split

_WAITS = ("bar", "shfl", "barrier")  # where threads meet: by their line, not by that of a header


def _declaration(function: Function) -> str:
    if function.is_entry:
        return f"void {identifier(function.name)}(const void* const* arguments)"
    names = ([function.result] if function.result else []) + function.parameters
    return (
        f"static void {identifier(function.name)}({', '.join(f'unsigned char* {identifier(name)}' for name in names)})"
    )


def _code(function: Function, body: Body, file: str) -> tuple[list[str], list[str]]:
    """Declarations for its beginning, as nothing may jump over them, and what follows."""
    begin: list[str] = []
    lines: list[str] = []
    for statement in function.body:
        text = statement.text
        if text in "{}":
            lines.append(text)
            body.scopes.append({}) if text == "{" else body.scopes.pop()
        elif text.startswith(".pragma"):
            continue
        elif text.endswith(":"):
            lines.append(f"{identifier(text)[:-1]}:;")
        elif text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()  # type: ignore[union-attr]
            found = [re.fullmatch(r"(%?\w+)(?:<(\d+)>)?", name) for name in split(names)]
            all_names = [f"{f[1]}{n}" if f[2] else f[1] for f in found if f for n in range(int(f[2] or 1))]
            body.scopes[-1].update(dict.fromkeys(all_names, kind))
            declared = f"{TYPES[kind][0]} {', '.join(map(identifier, all_names))};"
            (begin if len(body.scopes) == 1 else lines).append(declared)
        elif variable := read_variable(text):
            body.variables[variable.name] = variable
            if variable.space != "shared":
                place = f"alignas(16) unsigned char {identifier(variable.name)}[{variable.size}];"
                (lines if len(body.scopes) > 1 else begin).append(place)
        else:
            if text.startswith(_WAITS):
                lines.append(f'#line {statement.line} "{file}"')
            lines.append(translate(statement, body))
    return begin, lines


def _definition(function: Function, module: Module, file: str) -> str:
    parameters = {*function.parameters, *([function.result] if function.result else [])}
    body = Body(module, parameters)
    begin, lines = _code(function, body, file)
    if function.is_entry:
        begin += (
            f"const auto* const {identifier(name)} = static_cast<const unsigned char*>(arguments[{n}]);"
            for n, name in enumerate(function.parameters)
        )
    at = 16  # nothing has address 0
    for variable in sorted(body.shared, key=lambda v: v.size == 0):  # dynamic memory is behind the others
        align = max(variable.align, 16)
        at = -(-at // align) * align
        begin.append(f"constexpr std::size_t {identifier(variable.name)} = {at};")
        at += variable.size
    dynamic = any(variable.size == 0 for variable in body.shared)
    begin.append(f"static_assert({at} + {'kMostDynamicShared' if dynamic else 0} <= kSharedSize);")
    return "\n".join([f"{_declaration(function)} {{", *begin, *lines, "}"])


def _definition_of(variable: Variable) -> str:
    values = f" = {variable.values}" if variable.values else ""
    return f"alignas({max(variable.align, 8)}) unsigned char {identifier(variable.name)}[{variable.size}]{values};"


def _host_name(name: str) -> str:
    """As the host's compiler calls it, for which a namespace without name is called alike in every file."""
    while found := re.search(r"(\d+)_GLOBAL__N__", name):
        digits, end = found[1], found.end(1)
        lengths = [digits[n:] for n in range(len(digits))]  # digits of what is in front may precede the length
        length = next(n for n in lengths if re.search(r"_cu_[0-9a-f]{8}(_[0-9]+)?$", name[end : end + int(n)]))
        name = f"{name[: end - len(length)]}12_GLOBAL__N_1{name[end + int(length) :]}"
    return name


def main(source: str, folder: str, parts: str) -> None:
    stem = Path(source).stem
    module = read_module(Path(source).read_text())
    variables = [variable for variable in module.variables.values() if variable.space == "global"]
    declared = [f"extern unsigned char {identifier(variable.name)}[{variable.size}];" for variable in variables]
    defined = [_definition_of(variable) for variable in variables]
    helpers = [function for function in module.functions if not function.is_entry]
    entries = [function for function in module.functions if function.is_entry]
    common = [f"{_declaration(helper)};" for helper in helpers]
    common += [_definition(helper, module, f"{stem}.ptx") for helper in helpers]
    for part in range(int(parts)):
        mine = entries[part :: int(parts)]
        lines = ['#include "cuda_compiled/instructions.h"', f"namespace compiled_{stem} {{", *declared]
        lines += (defined if part == 0 else []) + common
        lines += [_definition(function, module, f"{stem}.ptx") for function in mine]
        lines += [
            f'const cuda_emulation::CompiledKernel kernel_{n}("{_host_name(f.name)}", &{identifier(f.name)});'
            for n, f in enumerate(mine)
        ]
        Path(folder, f"{stem}_{part}.cpp").write_text("\n".join([*lines, "}", ""]))


if __name__ == "__main__":
    main(*sys.argv[1:])
