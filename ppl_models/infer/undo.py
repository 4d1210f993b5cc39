"""Programs on trial: what they do to the Python objects that they hold is undone."""

from __future__ import annotations

import copy
import itertools
import random
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ppl_models.infer.guards import names_in, objects, of_a_library

# Iterators whose copies go on by themselves.
_COPIED = (type(iter([])), type(iter(())), type(iter(range(0))), itertools.count, itertools.repeat)
_ABSENT = object()


@contextmanager
def objects_undone(*programs: Any) -> Iterator[None]:
    """Run a block that leaves attributes, containers, closures and random streams as they were.

    Within the block, iterators over lists and counts are copies of those outside. Values of
    tensors are not looked after.

    Arguments:
        programs: Models, guides and objectives, which are run in the block.
    """
    streams = random.getstate(), np.random.get_state()  # noqa: NPY002 - what programs draw from
    held = objects(*programs)
    undo = [put_back for value in held for put_back in _kept(value)]
    copies: dict[int, Any] = {}
    for value in held:
        _hand_out(value, copies)
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        random.setstate(streams[0])
        np.random.set_state(streams[1])  # noqa: NPY002


def _kept(value: Any) -> Iterator[Callable[[], Any]]:
    """Yield functions that put an object back to what it is now."""
    if isinstance(value, dict):
        yield _dict_kept(value)
    elif isinstance(value, list | deque):
        items = [*value]
        yield lambda: (value.clear(), value.extend(items))
    elif isinstance(value, set):
        members = {*value}
        yield lambda: (value.clear(), value.update(members))
    elif isinstance(value, np.ndarray):
        array = value.copy()
        yield lambda: np.copyto(value, array) if value.flags.writeable else None
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        yield lambda: value.set_state(state)
    elif isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        yield _attribute_kept(bits, "state")
    elif isinstance(value, random.Random):
        stream = value.getstate()
        yield lambda: value.setstate(stream)
    elif isinstance(value, np.random.RandomState):
        numbers = value.get_state()
        yield lambda: value.set_state(numbers)
    elif isinstance(value, type):
        for kind in value.__mro__:
            if not of_a_library(kind):
                yield _class_kept(kind)
    else:
        yield from _object_kept(value)


def _object_kept(value: Any) -> Iterator[Callable[[], Any]]:
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield _attribute_kept(cell, "cell_contents")
        if not of_a_library(value):
            yield _names_kept(value)
    if isinstance(value, nn.Module):
        for held in (value._parameters, value._buffers, value._modules):
            yield _dict_kept(held)
    if isinstance(getattr(value, "__dict__", None), dict):
        yield _dict_kept(vars(value))
    for kind in type(value).__mro__:
        slots = () if of_a_library(kind) else vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if name != "__dict__":
                yield _attribute_kept(value, name)


def _dict_kept(value: dict[Any, Any]) -> Callable[[], None]:
    before = dict(value)

    def put_back() -> None:
        if [*value] != [*before] or any(value[key] is not before[key] for key in before):
            value.clear()
            value.update(before)

    return put_back


def _attribute_kept(value: Any, name: str) -> Callable[[], None]:
    try:
        before = getattr(value, name)
    except (AttributeError, ValueError):  # not filled yet
        return lambda: None
    return lambda: setattr(value, name, before)


def _class_kept(kind: type) -> Callable[[], None]:
    before = dict(vars(kind))

    def put_back() -> None:
        now = dict(vars(kind))
        for name in now.keys() - before.keys():
            delattr(kind, name)
        for name, item in before.items():
            if now.get(name, _ABSENT) is not item:
                setattr(kind, name, item)

    return put_back


def _names_kept(function: types.FunctionType) -> Callable[[], None]:
    """Keep the globals that a function names."""
    scope, names = function.__globals__, {*names_in(function.__code__)}
    before = {name: scope[name] for name in names if name in scope}
    return lambda: scope.update(before)


def _hand_out(value: Any, copies: dict[int, Any]) -> None:
    """Let an object hold copies of its iterators."""
    holders: list[Any] = [value, getattr(value, "__dict__", None)]
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            if isinstance(held := _content(cell), _COPIED):
                cell.cell_contents = _copied(held, copies)
        scope = value.__globals__
        for name in () if of_a_library(value) else names_in(value.__code__):
            if isinstance(held := scope.get(name), _COPIED):
                scope[name] = _copied(held, copies)
    for holder in holders:
        if isinstance(holder, dict | list):
            places = holder.items() if isinstance(holder, dict) else enumerate(holder)
            for place, held in places:
                if isinstance(held, _COPIED):
                    holder[place] = _copied(held, copies)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    if id(value) not in copies:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                copies[id(value)] = copy.copy(value)
            except TypeError:  # of a later Python
                copies[id(value)] = value
    return copies[id(value)]
