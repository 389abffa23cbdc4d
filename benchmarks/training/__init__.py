"""Training under label noise: any of the losses on any of the data sets, the same wrong labels and the same seeds.

>>> from benchmarks.training import TrainingConfig, run_training
>>> results = run_training(TrainingConfig(noise=("0.4",), seeds=(0,), changes={"epochs": 2}, verbose=False))
>>> results.runs[-1].loss
'dal'
"""

from benchmarks.training.cli import main, parse
from benchmarks.training.compare import Results, run_training
from benchmarks.training.config import TrainingConfig
from benchmarks.training.data import load_data
from benchmarks.training.errors import UsageError
from benchmarks.training.recipes import PRESETS, Recipe
from benchmarks.training.records import Run
from benchmarks.training.report import write_report

__all__ = [
    "PRESETS",
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
