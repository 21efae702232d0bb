"""Every example in a docstring is true, in every package."""

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import graceful
import graceful.evaluation
import graceful.flows
import graceful.indexing
import graceful.training

PACKAGES = (graceful.training, graceful.indexing, graceful.evaluation, graceful.flows)
MODULES = ["graceful"] + [
    found.name for package in PACKAGES for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


def has_examples(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and ">>> " in open(spec.origin).read()


WITH_EXAMPLES = [name for name in MODULES if has_examples(name)]


def test_every_package_has_examples():
    assert {name.split(".")[1] for name in WITH_EXAMPLES if "." in name} >= {"training", "evaluation", "flows"}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.ismodule(module)
    with np.printoptions(legacy=False):
        result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
