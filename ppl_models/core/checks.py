"""Checks of single arguments, with one wording for all."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor


def check_count(caller: str, name: str, value: int, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`.

    Raises:
        ValueError: Saying what was required and what came.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{caller}: {name} must be an integer >= {least}, got {value!r}.")


def check_positive(caller: str, name: str, value: float | Tensor) -> None:
    """Refuse what is not a finite number above 0, by itself or in a tensor without dimensions.

    Raises:
        ValueError: Saying what was required and what came.
    """
    number = value.item() if isinstance(value, Tensor) and value.ndim == 0 else value
    if not isinstance(number, Real) or isinstance(number, bool) or not 0.0 < number < math.inf:
        raise ValueError(f"{caller}: {name} must be a finite number > 0, got {value!r}.")


def checked_sizes(
    caller: str, name: str, value: Any, *, least: int = 0, alone: bool = False
) -> tuple[int, ...]:
    """Return a sequence of positive integers as a tuple.

    Arguments:
        caller: Who asks for it.
        name: Of the argument.
        value: What came.
        least: How many there must be.
        alone: Whether one integer stands for a sequence of one.

    Raises:
        ValueError: Saying what was required and what came.
    """
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) if alone else None
    if (
        sizes is None
        or len(sizes) < least
        or not all(isinstance(one, Integral) and not isinstance(one, bool) for one in sizes)
        or min(sizes, default=1) < 1
    ):
        wanted = "a positive integer or a sequence of them" if alone else "positive integers"
        raise ValueError(
            f"{caller}: {name} must be {wanted}, such as (20,){', one or more' if least else ''}, got "
            f"{value!r}."
        )
    return tuple(int(one) for one in sizes)


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Refuse a name that is not among those known.

    Raises:
        ValueError: With the nearest name, and all of them.
    """
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.4)
    raise ValueError(
        f"there is no {kind} {name!r}.{f' Did you mean {near[0]!r}?' if near else ''} "
        f"Known: {', '.join(names)}."
    )
