"""Measurements of fused_losses: ``python -m benchmarks``, ``python -m benchmarks.report``, ``pytest benchmarks``."""
