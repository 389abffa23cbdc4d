"""The loss in a plain loop, and by dal_kernels.integrations in PyTorch Lightning, Hugging Face Trainer and timm.

Each module is a whole training of its framework; ``python -m benchmarks.recipes.plain`` runs one. The schedule
follows from what each framework's checkpoint holds, so that a resumed training has the q it would have had.
"""
