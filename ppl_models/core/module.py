"""Modules with a name of their own."""

from __future__ import annotations

from typing import Any

from pyro.nn import PyroModule

from ppl_models.core.random import unique_name


class NamedModule(PyroModule):
    """A `PyroModule` whose name no other instance bears, not even its copies.

    Pyro keys its global parameter store by the name of a module: two instances with the same name
    would share parameters, and the second would silently stop learning.
    """

    def __init__(self) -> None:
        super().__init__(unique_name(type(self).__name__.lower()))

    def __setstate__(self, state: Any) -> None:
        # Both `copy.deepcopy` and unpickling come by here.
        super().__setstate__(state)
        self._pyro_name = unique_name(type(self).__name__.lower())
