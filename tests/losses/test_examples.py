"""The examples in the docstrings of the losses give what they promise."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["classification", "criticality", "distillation"])
def test_the_examples_of_the_docstrings(name: str) -> None:
    found = doctest.testmod(import_module(f"dasmil.losses.{name}"))
    assert found.attempted > 0 and found.failed == 0
