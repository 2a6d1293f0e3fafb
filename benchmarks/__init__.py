"""Measurements of fused_losses and of what it competes with.

    make bench                                    CPU summary in five minutes, report and pictures in results/cpu
    make bench-compile                            torch.compile of every loss, half an hour; joins the report
    python -m benchmarks --help                   suites ("summary", "cuda", ...), parts, --resume
    python -m benchmarks.report FILES             Markdown with the targets, tables, pictures; files of one
                                                  machine and build, e.g. of two suites, become one
    python -m benchmarks.report --compare A B     what became slower by more than 10 % and the noise
    pytest benchmarks -k "hem-fused-4096x1000-float32-fwd_bwd"
    pytest benchmarks --benchmark-disable         checks only, a minute
    benchmarks/gpu_check.sh                       builds, tests and measures on a GPU

How it is measured. Every provider's value and gradient are compared with float64 before it is timed; what computes
something else, or raises, gets no row and is listed. Providers and modes of a case, and ``copy_`` of the logits, take
turns in one loop. Calls rotate over inputs larger than the last cache (at least 256 MB). With ``--tries`` every job is
timed several times, and the run whose copy was fastest is kept. Logits are normal times 3. Medians and quartiles; on
CUDA GPU time by events behind a spinning kernel, so launches are not in it; elapsed time for small batches. The
upstream gradient is 1, and 0.375 in modes that end in "scaled". Libraries that overwrite the logits get a fresh copy
outside the timed region. "Plain PyTorch" is the fastest of three spellings: torch's own function, a few lines without
options (``snippets.py``), and ``fused_losses.reference``.

Bytes: the floor is one read of the logits and, with a backward, one write of the gradient; what plain PyTorch moves is
counted operator by operator (``traffic.py``). Extra memory is the largest sum of tensors alive beyond the inputs
(``measure.peak_extra_bytes``).
"""
