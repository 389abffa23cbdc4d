"""The losses in other people's trainers: Lightning, Hugging Face, Accelerate, fastai and timm, a module each.

None of the frameworks comes with this package, and a module imports its own: ``from dal_kernels.integrations.lightning
import ScheduleCallback``. Whole trainings by each are in benchmarks/recipes of the checkout.
"""
