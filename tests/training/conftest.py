"""Data that several tests train on."""

from __future__ import annotations

import pytest

from dal_kernels.training.data import DataSet, load_data


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load_data("digits")
