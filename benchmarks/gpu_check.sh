#!/usr/bin/env bash
# Builds, tests and measures fused_losses on the GPU at hand. Run from the repository root:
#
#   benchmarks/gpu_check.sh [build] [smoke] [test] [sanitizer] [bench]          (default: all, in this order)
#
#   build      compiles in place for this GPU's architecture (needs cmake >= 3.24, nvcc, pybind11; ninja is used if found)
#   smoke      every loss on the GPU against the CPU over dtypes and layouts, and under CUDA graph capture
#   test       tests/, one file at a time, and every benchmark once
#   sanitizer  compute-sanitizer over a short smoke run, if the tool exists
#   bench      python -m benchmarks: losses against copy_, PyTorch and others; continues where a run was cut off
#
# Each step stays below ten minutes (STEP_TIMEOUT seconds). What has passed for the same sources is skipped when the script
# is run again; FORCE=1 repeats it. Results go to $OUT, by default benchmarks/results/<gpu name>. PYTHON chooses the
# interpreter; its torch must see the GPU.
set -u -o pipefail

PYTHON=${PYTHON:-python3}
STEP_TIMEOUT=${STEP_TIMEOUT:-570}

if [ ! -f CMakeLists.txt ] || [ ! -d fused_losses ]; then
    echo "gpu_check.sh: run it from the repository root, not from $PWD" >&2
    exit 2
fi
gpu=$("$PYTHON" - <<'PY'
import torch
if not torch.cuda.is_available():
    raise SystemExit("gpu_check.sh: torch " + torch.__version__ + " sees no CUDA device")
major, minor = torch.cuda.get_device_capability()
print(torch.cuda.get_device_name().replace(" ", "-"), f"{major}{minor}")
PY
) || exit 2
read -r gpu_name architecture <<<"$gpu"
OUT=${OUT:-benchmarks/results/$gpu_name}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
sources=$(find CMakeLists.txt csrc fused_losses tests benchmarks -type f \
    \( -name '*.py' -o -name '*.sh' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.txt' \) \
    -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
failed=()

# step NAME COMMAND...: runs it with a log, unless it has passed for these sources.
step() {
    local name=$1 log="$OUT/$1.log" passed="$OUT/$1.passed"
    shift
    if [ "${FORCE:-0}" != 1 ] && [ "$(cat "$passed" 2>/dev/null)" = "$sources" ]; then
        echo "== $name: passed before"
        return 0
    fi
    rm -f "$passed"
    echo "== $name"
    if timeout "$STEP_TIMEOUT" "$@" 2>&1 | tee "$log"; then
        echo "$sources" >"$passed"
    else
        echo "== $name: FAILED (exit status ${PIPESTATUS[0]}; log: $log)"
        failed+=("$name")
        return 1
    fi
}

build() {
    local generator=()
    command -v ninja >/dev/null && generator=(-G Ninja)
    step build.configure env FUSED_LOSSES_CUDA=1 cmake -S . -B build/gpu "${generator[@]}" \
        -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" \
        -DFUSED_LOSSES_PTXAS_REPORT=ON &&
        step build.compile cmake --build build/gpu --parallel
}

tests() {
    local file
    for file in tests/test_*.py; do
        step "test.$(basename "$file" .py)" "$PYTHON" -m pytest -q -p no:cacheprovider "$file"
    done
    step test.benchmarks "$PYTHON" -m pytest -q -p no:cacheprovider benchmarks --benchmark-disable
}

sanitizer() {
    local tool
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitizer: skipped, compute-sanitizer is not on PATH"
        return 0
    fi
    for tool in memcheck racecheck synccheck initcheck; do  # PyTorch's caching allocator would hide overruns between its blocks
        step "sanitizer.$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_smoke.py --quick
    done
}

bench() {
    local file="$OUT/results.json"
    step bench.losses "$PYTHON" -m benchmarks --suite cuda --resume --parts losses --out "$file" &&
        step bench.rest "$PYTHON" -m benchmarks --suite cuda --resume --parts accuracy,end_to_end --out "$file" &&
        step bench.report "$PYTHON" -m benchmarks.report "$file" --out "$OUT"
}

stages=("$@")
[ $# -gt 0 ] || stages=(build smoke test sanitizer bench)
for stage in "${stages[@]}"; do
    case $stage in
        build) build || break ;;
        smoke) step smoke "$PYTHON" benchmarks/gpu_smoke.py ;;
        test) tests ;;
        sanitizer) sanitizer ;;
        bench) bench ;;
        *)
            echo "gpu_check.sh: unknown stage '$stage' (build, smoke, test, sanitizer, bench)" >&2
            exit 2
            ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed; results in $OUT"
