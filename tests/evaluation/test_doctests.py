"""Every example in a docstring is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import evaluation

MODULES = [f"evaluation.{module.name}" for module in pkgutil.iter_modules(evaluation.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name: str) -> None:
    with np.printoptions(legacy=False):
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
