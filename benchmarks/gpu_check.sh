#!/usr/bin/env bash
# Builds, tests and measures fused_losses on the GPU at hand; benchmarks/gpu_check.py says how, as does --help.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
