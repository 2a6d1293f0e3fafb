"""C++ for each instruction, on top of instructions.h. An instruction that is not known here is an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ptx import TYPES, Module, Statement, Variable, split

_SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ntid.x": "blockDim.x",
    "%ctaid.x": "blockIdx.x",
    "%nctaid.x": "gridDim.x",
    "%cluster_ctarank": "__clusterRelativeBlockRank()",
    "%cluster_nctarank": "__clusterSizeInBlocks()",
}

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^"}


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


@dataclass
class Body:
    """What the instructions of a function refer to."""

    module: Module
    parameters: set[str]
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])  # types of registers
    variables: dict[str, Variable] = field(default_factory=dict)  # of the function
    shared: list[Variable] = field(default_factory=list)  # that it uses

    def type_of(self, register: str) -> str | None:
        return next((scope[register] for scope in reversed(self.scopes) if register in scope), None)

    def _variable(self, name: str) -> str:
        variable = self.variables.get(name) or self.module.variables.get(name)
        if variable and variable.space == "shared":
            if variable not in self.shared:
                self.shared.append(variable)
            return f"u64({identifier(name)})"  # where it is within the block's memory
        assert variable or name in self.parameters, name
        return f"u64(&{identifier(name)}[0])"

    def read(self, operand: str, kind: str) -> str:
        """The operand as a number of that type."""
        wanted = TYPES[kind][0]
        if of_register := self.type_of(operand):
            name = identifier(operand)
            return name if TYPES[of_register][0] == wanted else f"as<{wanted}>({name})"
        if found := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", operand):
            return f"as<{wanted}>(0x{found[2]}{'u' if found[1] == 'f' else 'ull'})"
        if re.fullmatch(r"-?\d+", operand):
            return f"{wanted}({int(operand) % 2**64}ull)" if wanted != "bool" else str(operand != "0").lower()
        if operand in _SPECIAL:
            return f"{wanted}({_SPECIAL[operand]})"
        return f"{wanted}({self._variable(operand)})"

    def write(self, register: str, value: str, kind: str) -> str:
        of_register = self.type_of(register)
        if of_register is None:
            assert register == "_", register
            return f"(void)({value});"
        to, given = TYPES[of_register][0], TYPES[kind][0]
        return f"{identifier(register)} = " + (f"{value};" if to == given else f"as<{to}>({given}({value}));")

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand.replace(" ", ""))
        assert found, operand
        of_register = self.type_of(found[1])
        begin = f"u64({identifier(found[1])})" if of_register else self._variable(found[1])
        return f"{begin} + s64({found[2]})" if found[2] else begin


@dataclass(frozen=True)
class Instruction:
    words: list[str]  # its name, at the dots
    operands: list[str]
    line: int
    body: Body

    @property
    def kind(self) -> str:
        return self.words[-1]

    def one_of(self, *words: str) -> str | None:
        return next((word for word in self.words if word in words), None)

    def read(self, number: int, kind: str | None = None) -> str:
        return self.body.read(self.operands[number], kind or self.kind)

    def result(self, value: str, kind: str | None = None) -> str:
        return self.body.write(self.operands[0], value, kind or self.kind)

    def address(self, number: int) -> str:
        return self.body.address(self.operands[number])


_TABLE: dict[str, Callable[[Instruction], str]] = {}


def _for(*names: str) -> Callable[[Callable[[Instruction], str]], Callable[[Instruction], str]]:
    def add(function: Callable[[Instruction], str]) -> Callable[[Instruction], str]:
        _TABLE.update(dict.fromkeys(names, function))
        return function

    return add


def _as_bits(kind: str) -> str:
    return f"b{8 * TYPES[kind][1]}"


# ---- Numbers -------------------------------------------------------------------------------------------------------


@_for("add", "sub", "mul", "div", "rem", "mad", "fma", "min", "max")
def _arithmetic(i: Instruction) -> str:
    name, kind = i.words[0], i.kind
    if kind in ("f16x2", "bf16x2"):
        assert name == "max" and len(i.words) == 2
        return i.result(f"max_of_pairs<{kind[:-2]}>({i.read(1, 'b32')}, {i.read(2, 'b32')})", "b32")
    if kind.startswith("f"):
        return i.result(_of_floats(i))
    c, size = TYPES[kind]
    if "wide" in i.words:
        wide = f"{kind[0]}{16 * size}"
        more = f" + {i.read(3, wide)}" if name == "mad" else ""
        return i.result(f"{TYPES[wide][0]}({i.read(1)}) * {TYPES[wide][0]}({i.read(2)}){more}", wide)
    if name in ("div", "rem", "min", "max"):
        return i.result(f"{name}_of<{c}>({i.read(1)}, {i.read(2)})")
    assert name in ("add", "sub") or "lo" in i.words, i.words
    x, y = (f"u64({i.read(n)})" for n in (1, 2))
    more = f" + u64({i.read(3)})" if name == "mad" else ""
    return i.result(f"{c}({x} {_SIGNS.get(name, '*')} {y}{more})")


def _of_floats(i: Instruction) -> str:
    name, x, y = i.words[0], i.read(1), i.read(2)
    rest = [word for word in i.words[1:-1] if word != "rn"]
    if rest:
        z = f", {i.read(3)}" if name == "fma" else ""
        special = {"fma.rm": "fma_down", "add.rz": "add_to_zero", "max.NaN": "max_or_nan"}
        return f"{special['.'.join([name, *rest])]}({x}, {y}{z})"
    if name == "fma":
        return f"std::fma({x}, {y}, {i.read(3)})"
    if name in ("min", "max"):
        return f"{name}_of_floats({x}, {y})"
    return f"{x} {_SIGNS[name]} {y}"


@_for("neg", "abs", "not", "and", "or", "xor", "shl", "shr", "bfi", "prmt", "sqrt", "rcp", "ex2", "lg2", "rsqrt")
def _others(i: Instruction) -> str:
    name, kind, values = i.words[0], i.kind, ", ".join(i.read(n) for n in range(1, len(i.operands)))
    if "approx" in i.words:
        names = {"ex2": "exp2", "lg2": "log2", "rsqrt": "rsqrt", "rcp": "reciprocal"}
        assert "ftz" in i.words
        return i.result(
            f"cuda_emulation::{names[name]}_approximately({values})" if kind == "f32" else f"coarse_{name}({values})"
        )
    assert len(i.words) == 2 or i.words[1] == "rn", i.words
    c = TYPES[kind][0]
    if name in ("and", "or", "xor"):
        return i.result(f"{c}({i.read(1)} {_SIGNS[name]} {i.read(2)})")
    if name == "not":
        return i.result(f"!{values}" if kind == "pred" else f"{c}(~{values})")
    if name in ("shl", "shr"):
        return i.result(f"{name}_of<{c}>({i.read(1)}, {i.read(2, 'u32')})")
    if name == "bfi":
        return i.result(f"insert_bits<{c}>({i.read(1)}, {i.read(2)}, {i.read(3, 'u32')}, {i.read(4, 'u32')})")
    if name == "rcp":
        return i.result(f"{c}(1) / {values}")
    return i.result(
        {
            "neg": f"{c}(-{values})",
            "abs": f"std::abs({values})",
            "sqrt": f"std::sqrt({values})",
            "prmt": f"permute({values})",
        }[name]
    )


@_for("setp")
def _compare(i: Instruction) -> str:
    how, x, y = i.words[1], i.read(1), i.read(2)
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    if how in ("nan", "num"):
        return i.result(f"{'!' if how == 'num' else ''}({x} != {x} || {y} != {y})", "pred")
    if how.endswith("u") and i.kind.startswith("f"):  # true of a NaN
        opposite = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}[how]
        assert how != "equ"
        return i.result(f"!({x} {opposite} {y})", "pred")
    assert how != "ne" or not i.kind.startswith("f")
    return i.result(f"{x} {signs[how]} {y}", "pred")


@_for("selp")
def _select(i: Instruction) -> str:
    return i.result(f"{i.read(3, 'pred')} ? {i.read(1)} : {i.read(2)}")


@_for("mov")
def _move(i: Instruction) -> str:
    to, given = i.operands
    parts = split((to if to.startswith("{") else given).strip("{}"))
    width = 8 * TYPES[i.kind][1] // len(parts) if i.kind != "pred" else 1
    if to.startswith("{"):
        copies = " ".join(
            i.body.write(part, f"u{width}(all >> {width * n})", f"u{width}") for n, part in enumerate(parts)
        )
        return f"{{ const auto all = {i.read(1, _as_bits(i.kind))}; {copies} }}"
    if given.startswith("{"):
        shifted = (f"u64({i.body.read(part, f'u{width}')}) << {width * n}" for n, part in enumerate(parts))
        return i.result(f"{TYPES[_as_bits(i.kind)][0]}({' | '.join(shifted)})", _as_bits(i.kind))
    return i.result(i.read(1))


@_for("cvt")
def _convert(i: Instruction) -> str:
    to, given = i.words[-2:]
    rounding = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
    integral = i.one_of(*rounding)
    assert not i.one_of("rz", "rm", "rp", "ftz") and ("sat" not in i.words or to == given == "f32")
    if to in ("f16x2", "bf16x2"):
        return i.result(f"pair_of<{to[:-2]}>({i.read(1)}, {i.read(2)})", "b32")
    if to in ("f16", "bf16"):
        return i.result(f"narrowed<{to}>({i.read(1)})", "b16")
    if given == "f16":
        return i.result(f"widened<f16>({i.read(1, 'b16')})", to)
    x = i.read(1)
    if "sat" in i.words:
        return i.result(f"saturated({x})", to)
    if given.startswith("f") and not to.startswith("f"):
        return i.result(f"integer_of<{TYPES[to][0]}>({rounding[integral or '']}({x}))", to)
    return i.result(f"{rounding[integral]}({x})" if integral else f"{TYPES[to][0]}({x})", to)


# ---- Memory --------------------------------------------------------------------------------------------------------


def _vector(i: Instruction, operand: str) -> list[str]:
    return split(operand.strip("{}")) if i.one_of("v2", "v4") else [operand]


def _space(i: Instruction) -> str:
    return "local" if i.one_of("param", "local") else i.one_of("global", "shared") or "generic"


@_for("ld")
def _load(i: Instruction) -> str:
    space, registers = _space(i), _vector(i, i.operands[0])
    c = TYPES[i.kind][0]
    how = "kBypass" if "cg" in i.words else "kUsual"
    copies = " ".join(i.body.write(register, f"all[{n}]", i.kind) for n, register in enumerate(registers))
    call = f"load_{space}<{c}, {len(registers)}>({i.address(1)}{f', {how}' if space == 'global' else ''})"
    return f"{{ AT({i.line}) const auto all = {call}; {copies} }}"


@_for("st")
def _store(i: Instruction) -> str:
    if "async" in i.words:
        assert i.words[-2].endswith("::bytes") and i.kind == "b32"
        return f"AT({i.line}) store_async({i.address(0)}, {i.read(1)}, {i.address(2)});"
    space, values = _space(i), _vector(i, i.operands[1])
    read = ", ".join(i.body.read(value, i.kind) for value in values)
    return f"AT({i.line}) store_{space}<{TYPES[i.kind][0]}, {len(values)}>({i.address(0)}, {{{read}}});"


@_for("cp")
def _copy(i: Instruction) -> str:
    if "commit_group" in i.words:
        return "__pipeline_commit();"
    if "wait_group" in i.words:
        return f"__pipeline_wait_prior({i.operands[0]});"
    assert i.operands[2] == i.operands[3]
    return f"AT({i.line}) copy_async<{i.operands[2]}>({i.address(0)}, {i.address(1)});"


@_for("atom")
def _atomic(i: Instruction) -> str:
    assert i.words[1] == "global" and i.kind == "u32"
    function = {"inc": "atomicInc", "add": "atomicAdd", "max": "atomicMax"}[i.words[2]]
    return f"AT({i.line}) " + i.result(f"{function}(atomic_place({i.address(1)}), {i.read(2)})")


@_for("cvta")
def _convert_address(i: Instruction) -> str:
    if "shared" in i.words:
        return i.result(f"{'shared_of' if 'to' in i.words else 'generic_of'}_address({i.read(1)})")
    return i.result(i.read(1))


@_for("mapa")
def _map_address(i: Instruction) -> str:
    return i.result(f"address_in_block({i.read(1)}, {i.read(2)})")


@_for("membar", "fence", "prefetch")
def _order(i: Instruction) -> str:
    return "cuda_emulation::device_fence();" if i.words[0] == "membar" else ""


# ---- Waiting -------------------------------------------------------------------------------------------------------


@_for("shfl")
def _shuffle(i: Instruction) -> str:
    register, _, predicate = i.operands[0].partition("|")
    found = (
        f"shuffle<Shuffle::{i.words[2]}>({', '.join(i.read(n, 'b32') for n in range(1, 5))}, {identifier(predicate)})"
    )
    return i.body.write(register, found, "b32")


@_for("bar", "barrier")
def _barrier(i: Instruction) -> str:
    if i.words[0] == "barrier":
        return "" if "arrive" in i.words else "wait_for_cluster();"
    if "warp" in i.words:
        return f"__syncwarp({i.read(0, 'u32')});"
    if "red" in i.words:
        assert i.words[2:] == ["or", "pred"]
        return i.result(f"__syncthreads_or({i.read(2)}) != 0")
    assert i.operands == ["0"]
    return "__syncthreads();"


@_for("mbarrier")
def _counting_barrier(i: Instruction) -> str:
    if i.words[1] == "try_wait":
        return i.result(f"try_wait({i.address(1)}, {i.read(2, 'u32')})", "pred")
    number = 0 if i.words[1] == "init" else 1
    return f"{i.words[1]}({i.address(number)}, {i.read(number + 1, 'u32')});"


@_for("griddepcontrol", "nanosleep")
def _waits(i: Instruction) -> str:
    return {"wait": "wait_for_launch_before();", "u32": "__nanosleep(0);"}.get(i.kind, "")


# ---- Flow ----------------------------------------------------------------------------------------------------------


@_for("bra", "ret")
def _jump(i: Instruction) -> str:
    return f"goto {identifier(i.operands[0])};" if i.words[0] == "bra" else "return;"


@_for("call")
def _call(i: Instruction) -> str:
    arguments = [part for operand in i.operands for part in (split(operand[1:-1]) if operand[0] == "(" else [])]
    name = next(operand for operand in i.operands if operand[0] != "(")
    return f"{'assertion_failed' if name == '__assertfail' else identifier(name)}({', '.join(arguments)});"


def translate(statement: Statement, body: Body) -> str:
    """A C++ statement."""
    text, condition = statement.text, ""
    if found := re.match(r"@(!?)(\S+) ", text):
        condition, text = f"if ({found[1]}{identifier(found[2])}) ", text[found.end() :]
    name, _, operands = text.partition(" ")
    words = name.split(".")
    code = _TABLE[words[0]](Instruction(words, split(operands), statement.line, body))
    return condition + (f"{{ {code} }}" if condition else code)
