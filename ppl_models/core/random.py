"""Seeds that isolate, and names that never collide."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch

_counters: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def unique_name(prefix: str) -> str:
    """Return `prefix` with a number that no earlier call in this process returned.

    Pyro keys its global parameter store by the name of a module: two instances with the same name
    would share parameters, and the second would silently stop learning.
    """
    return f"{prefix}_{next(_counters[prefix])}"


def stream(seed: int, *keys: int) -> int:
    """Return the seed of one of many independent streams that belong to a seed."""
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1)[0])


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block on a random stream of its own.

    Arguments:
        seed: With an integer the block draws from that seed and the global random state is left
            as it was found. With None the block draws from the global stream and advances it.

    Raises:
        ValueError: If `seed` is neither None nor a non-negative integer.
    """
    if seed is None:
        yield
        return
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be None or an integer from 0 to 2**63 - 1, got {seed!r}.")
    # A fork of a GPU's stream opens that GPU: not for work on the CPU.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed))
        yield
