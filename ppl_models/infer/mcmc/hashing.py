"""Random numbers without a state: functions of a key, a tick and a place.

The stream of a chain does not depend on how many chains there are, nor on what the others do, and
a compiled graph draws the same numbers as an eager one.

Source:
    Steele, Lea & Flood (2014), the mixing function of SplitMix.
    https://doi.org/10.1145/2660193.2660195
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Of SplitMix, in two's complement, as int64 has them.
_FACTORS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


class Stream(NamedTuple):
    """Where each chain is in its stream of random numbers, which depends on nothing else."""

    key: Tensor  # (C,), int64
    tick: Tensor  # (C,), int64; another one makes independent numbers
    factors: Tensor  # (3,), int64: a tensor, since compilers fold constants into indices, and fail


def streams(seed: int, chains: Tensor) -> Stream:
    """Return the stream of each of some chains, at its start.

    Arguments:
        seed: Any integer.
        chains: Their numbers, shape (C,), int64.
    """
    factors = torch.tensor(_FACTORS, device=chains.device)
    start = torch.full_like(chains, (seed + 2**63) % 2**64 - 2**63)
    key = _mix(_mix(start, factors) + chains * factors[0], factors)
    return Stream(key, torch.zeros_like(chains), factors)


def uniforms(stream: Stream, many: int, first: int = 0) -> Tensor:
    """Return numbers in [0, 1), shape (many, C), float64.

    Arguments:
        stream: Of each chain.
        many: How many.
        first: Place of the first; other places make independent numbers.
    """
    factors = stream.factors
    places = torch.arange(first + 1, first + many + 1, device=factors.device).unsqueeze(1)
    now = _mix(stream.key + stream.tick * factors[0], factors)
    bits = _mix(now + places * factors[0], factors)
    return _shift(bits, 11).double() * 2.0**-53


def normals(stream: Stream, many: int, first: int = 0) -> Tensor:
    """Return standard normal numbers, shape (many, C), float64, as Box and Muller make them.

    They take `many` places, or one more.
    """
    pairs = (many + 1) // 2
    u = uniforms(stream, 2 * pairs, first)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:pairs]))
    angle = 2.0 * math.pi * u[pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])[:many]


def _mix(x: Tensor, factors: Tensor) -> Tensor:
    """Mix the bits: a bijection in which one bit changes about half of all."""
    x = (x ^ _shift(x, 30)) * factors[1]
    x = (x ^ _shift(x, 27)) * factors[2]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, with zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
