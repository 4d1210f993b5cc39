"""Evaluation mode, for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_mode(*programs: Any) -> Iterator[None]:
    """Run a block with modules in evaluation mode, then put their modes back.

    Dropout then draws nothing and batch norm learns nothing: a look at a program leaves it alone.
    """
    modules = [m for p in programs if isinstance(p, nn.Module) for m in p.modules()]
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


@contextmanager
def evaluating(*programs: Any) -> Iterator[None]:
    """Run a block without gradients and with modules in evaluation mode."""
    with evaluation_mode(*programs), torch.no_grad():
        yield
