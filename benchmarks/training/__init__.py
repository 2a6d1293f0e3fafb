"""Training with the losses: ``python -m benchmarks.training`` and the experiments of the papers.

PyTorch Lightning's Trainer is the engine (processes, precision, accumulation, checkpoints, logs). Ours are the data
(:mod:`.sources`, :mod:`.samples`, :mod:`.labels`), the choice of network (:mod:`.networks`) and the loss
(:mod:`.criterion`). :mod:`.experiments` runs the papers' comparisons with the same parts.
"""
