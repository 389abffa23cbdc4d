"""Training under label noise: any of the losses on any of the data sets, the same wrong labels and the same seeds.

>>> from dal_kernels.training import TrainingConfig, run_training
>>> results = run_training(TrainingConfig(noise=("0.4",), seeds=(0,), changes={"epochs": 2}, verbose=False))
>>> results.runs[-1].loss
'dal'
"""

from dal_kernels.training.cli import main, parse
from dal_kernels.training.compare import Results, run_training
from dal_kernels.training.config import TrainingConfig
from dal_kernels.training.data import load_data
from dal_kernels.training.errors import UsageError
from dal_kernels.training.inspection import Inspection
from dal_kernels.training.inspector import LabelInspector
from dal_kernels.training.recipes import PRESETS, Recipe
from dal_kernels.training.records import Run
from dal_kernels.training.report import write_report

__all__ = [
    "PRESETS",
    "Inspection",
    "LabelInspector",
    "Recipe",
    "Results",
    "Run",
    "TrainingConfig",
    "UsageError",
    "load_data",
    "main",
    "parse",
    "run_training",
    "write_report",
]
