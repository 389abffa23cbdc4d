"""The name of this copy of the package, and of its operators: several copies may be loaded at once, under other names.

A hub of kernels does so: it loads a package from any folder under a name that it makes up.
"""

from __future__ import annotations

import torch

__all__ = ["OPERATORS", "PACKAGE", "operators"]

PACKAGE = __name__.rpartition(".")[0]
# The name by which torch.ops knows the operators: dal_kernels, where the package is imported by its own name.
OPERATORS = PACKAGE.replace(".", "_")
operators = getattr(torch.ops, OPERATORS)
