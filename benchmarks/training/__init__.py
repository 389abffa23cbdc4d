"""Training under label noise: cross-entropy, GCE and DAL on one recipe, the same wrong labels and the same seeds.

>>> from benchmarks.training import TrainingConfig, run_training
>>> results = run_training(TrainingConfig(data="digits", noise=(0.4,), seeds=(0,), epochs=2, verbose=False))
>>> results.runs[-1].loss
'dal'
"""

from benchmarks.training.cli import main, parse
from benchmarks.training.data import load_data
from benchmarks.training.errors import UsageError
from benchmarks.training.experiment import Results, TrainingConfig, run_training
from benchmarks.training.records import Run
from benchmarks.training.report import write_report

__all__ = [
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
