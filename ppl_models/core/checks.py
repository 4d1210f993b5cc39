"""Checks of single arguments, with one wording for all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from numbers import Integral


def check_count(caller: str, name: str, value: int, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`.

    Raises:
        ValueError: Saying what was required and what came.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{caller}: {name} must be an integer >= {least}, got {value!r}.")


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
