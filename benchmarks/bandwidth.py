"""How fast the GPU at hand copies, which is what everything else is measured by: ``python -m benchmarks.bandwidth``."""

from __future__ import annotations

import argparse

import torch

from benchmarks.calls import Buffers, Copy
from benchmarks.cases import Case
from benchmarks.measure import time_calls

SHAPES = ((4096, 1000), (65536, 1000), (1 << 18, 1000))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    properties = torch.cuda.get_device_properties(0)
    print(
        f"{properties.name}: {properties.multi_processor_count} multiprocessors, compute capability "
        f"{properties.major}.{properties.minor}, {properties.L2_cache_size >> 20} MiB of L2"
    )
    for shape in SHAPES:
        case = Case("cross_entropy", shape, "bfloat16", "cuda")
        timing = time_calls({"copy": Copy(Buffers.of(case, *case.inputs()))}, 0.2, "device")["copy"]
        moved = 2 * case.logits_bytes
        print(
            f"copy_ of {case.logits_bytes / 1e6:.0f} MB: {timing.median:.1f} us "
            f"({timing.low:.1f}-{timing.high:.1f}), {moved / timing.median / 1e6:.2f} TB/s read and written"
        )


if __name__ == "__main__":
    main()
