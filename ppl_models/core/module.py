"""Modules with a name of their own, which know what they were made with."""

from __future__ import annotations

import inspect
from typing import Any, Self

from pyro.nn import PyroModule

from ppl_models.core.random import unique_name


class NamedModule(PyroModule):
    """A `PyroModule` whose name no other instance bears, not even its copies.

    Pyro keys its global parameter store by the name of a module: two instances with the same name
    would share parameters, and the second would silently stop learning.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        made = super().__new__(cls)
        object.__setattr__(made, "_given", (arguments, options))  # before there is a module
        return made

    def __init__(self) -> None:
        super().__init__(unique_name(type(self).__name__.lower()))

    def arguments(self) -> dict[str, Any]:
        """Return what it was made with, by name: what a saved run rebuilds it from."""
        arguments, options = self._given
        bound = inspect.signature(type(self)).bind(*arguments, **options)
        bound.apply_defaults()  # so that a later change of a default does not change an old run
        return dict(bound.arguments)

    def __setstate__(self, state: Any) -> None:
        # Both `copy.deepcopy` and unpickling come by here.
        super().__setstate__(state)
        self._pyro_name = unique_name(type(self).__name__.lower())
