"""The papers' comparisons, each one command: ``python -m benchmarks.training.experiments NAME [--full]``.

Results are JSON lines in ``benchmarks/results/training``; a command that is run again trains what is missing and writes
table and plot anew.
"""
