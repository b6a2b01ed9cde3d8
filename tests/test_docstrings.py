# SPDX-License-Identifier: MIT
"""Every example in a docstring runs and gives what it says."""

from __future__ import annotations

import doctest

import pytest

from fused_step import functional, modules, optim


@pytest.mark.parametrize("module", [functional, modules, optim], ids=lambda m: m.__name__)
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
