"""Zuko, imported without its side effect: it turns torch's checks of arguments off for everybody."""

from __future__ import annotations

import pyro

_CHECKS = pyro.settings.get("validate_distributions_torch")

import zuko

pyro.settings.set(validate_distributions_torch=_CHECKS)

__all__ = ["zuko"]
