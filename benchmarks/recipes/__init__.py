"""How to use the loss in a plain loop, PyTorch Lightning, Hugging Face Trainer and timm: two lines in each, to copy.

Each module is a whole training of its framework; ``python -m benchmarks.recipes.plain`` runs one. The schedule is
always set from what the framework itself saves and restores, so a resumed training has the q it would have had.
"""
