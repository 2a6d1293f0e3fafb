"""What makes C++ of compiled kernels (tests/cpp/cuda_compiled), which then run on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "cpp" / "cuda_compiled"
PTX = """
.version 9.0
.target sm_90
.shared .align 4 .b8 totals[128];
.extern .shared .align 16 .b8 rows[];
.global .align 4 .u32 ticket;

.entry _ZN5space45_GLOBAL__N__0123abcd_8_names_cu_0123abcd_18205scaleEv(
	.param .u64 scale_param_0
)
.maxntid 256, 1, 1
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<5>;
	.reg .b32 	%r<4>;
	.reg .b64 	%rd<3>;

	ld.param.u64 	%rd1, [scale_param_0];  // a comment
	mov.u32 	%r1, %tid.x;
	setp.gtu.f32 	%p1, %f1, 0f3F800000;
	@!%p1 bra 	$L__BB0_2;
	INSTRUCTION
	shfl.sync.bfly.b32 	%r2|%p1, %r1, 16, 31, -1;
$L__BB0_2:
	mov.u32 	%r3, rows;
	st.shared.u32 	[totals+4], %r3;
	ret;
}
"""


def translated(instruction: str, folder: Path) -> str:
    source = folder / "kernel.ptx"
    source.write_text(PTX.replace("INSTRUCTION", instruction))
    command = [sys.executable, str(FOLDER / "translate.py"), str(source), str(folder), "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    assert "scaleEv" not in (folder / "kernel_1.cpp").read_text()  # the other part
    return (folder / "kernel_0.cpp").read_text()


@pytest.mark.any_cpu
@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", "_f1 = std::fma(_f2, _f3, _f4);"),
        ("@%p1 mul.wide.s32 %rd2, %r1, -4;", "if (_p1) { _rd2 = as<u64>(s64(s64(as<s32>(_r1)) * s64("),
        ("ld.global.v2.f32 {%f1, %f2}, [%rd1+-8];", "load_global<float, 2>(u64(_rd1) + s64(-8), kUsual)"),
        ("mov.b64 {%r1, %r2}, %rd1;", "_r1 = u32(all >> 0); _r2 = u32(all >> 32);"),
        ("{ .reg .b16 low; cvt.rn.bf16.f32 low, %f1; }", "low = narrowed<bf16>(_f1);"),
    ],
)
def test_instructions(tmp_path, instruction, expected):
    code = translated(instruction, tmp_path)
    assert expected in code
    assert "_p1 = !(_f1 <= as<float>(0x3F800000u));" in code
    assert "if (!_p1) { goto _L__BB0_2; }" in code
    line = 1 + PTX.splitlines().index("	shfl.sync.bfly.b32 	%r2|%p1, %r1, 16, 31, -1;") + instruction.count("\n")
    assert f'#line {line} "kernel.ptx"\n_r2 = shuffle<Shuffle::bfly>(' in code
    assert "constexpr std::size_t totals = 16;" in code
    assert "constexpr std::size_t rows = 144;" in code  # dynamic memory is behind the other
    assert '("_ZN5space12_GLOBAL__N_15scaleEv"' in code  # as the host's compiler calls it


@pytest.mark.any_cpu
@pytest.mark.parametrize(
    "instruction", ["wgmma.fence;", "add.sat.f32 %f1, %f2, %f3;", "cvt.rz.f32.f64 %f1, %f2;", "mov.u32 %r1, nothing;"]
)
def test_an_unknown_instruction_is_an_error(tmp_path, instruction):
    with pytest.raises(RuntimeError, match="Error"):
        translated(instruction, tmp_path)
