"""Checks of single arguments, with one wording for all."""

from __future__ import annotations

from numbers import Integral


def check_count(caller: str, name: str, value: int, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`.

    Raises:
        ValueError: Saying what was required and what came.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{caller}: {name} must be an integer >= {least}, got {value!r}.")
