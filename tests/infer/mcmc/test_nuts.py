"""The tick: against a sampler written from the definition, and against exact targets."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ppl_models.infer.mcmc import nuts
from ppl_models.infer.mcmc.hashing import Stream, normals, streams, uniforms

Target = Callable[[Tensor], tuple[Tensor, Tensor]]


def gamma(q: Tensor) -> tuple[Tensor, Tensor]:
    """Logs of Gamma(2, 1) draws: skewed, with one tail that diverges."""
    return (2.0 * q - torch.exp(q)).sum(0), 2.0 - torch.exp(q)


def normal(q: Tensor) -> tuple[Tensor, Tensor]:
    """A correlated normal."""
    precision = _precision(len(q)).to(q)
    g = -(precision @ q)
    return 0.5 * (q * g).sum(0), g


def stretched(q: Tensor) -> tuple[Tensor, Tensor]:
    """A normal of very different scales, whose trajectories turn at different times."""
    precision = torch.tensor([[1.0], [9.0], [60.0]])
    return -0.5 * (precision * q * q).sum(0), -precision * q


def _precision(dim: int) -> Tensor:
    return torch.eye(dim) + 0.8 * torch.outer(torch.ones(dim), torch.linspace(0.5, 1.0, dim)).add(
        torch.outer(torch.linspace(0.5, 1.0, dim), torch.ones(dim))
    )


def blank(module: Any, chains: int, dim: int, slots: int, depth: int, step: float) -> Any:
    """A record and a tuning without adaptation."""
    rest = (torch.zeros(slots + 1, chains) for _ in range(5))
    record = module.Record(torch.zeros(slots + 1, dim, chains), *rest)
    tuning = module.Tuning(
        torch.full((chains,), step),
        *(torch.zeros(chains) for _ in range(5)),
        goal=torch.tensor(float(slots)),
        target=torch.tensor(0.8),
        adapts=torch.tensor(0.0),
        depth=torch.tensor(float(depth)),
    )
    return record, tuning


def sampled(
    target: Target, q: Tensor, transitions: int, *, depth: int, step: float, module: Any = nuts
) -> Any:
    """Run ticks until all chains have made some transitions; return their record, chains first."""
    dim, chains = q.shape
    stream = streams(7, torch.arange(chains))
    state = module.begin(q, target, stream, depth)
    stream = stream._replace(tick=stream.tick + 1)
    record, tuning = blank(module, chains, dim, transitions, depth, step)
    for _ in range(2**depth * transitions):
        state, stream, record, tuning = module.tick(state, stream, record, tuning, target)
        if bool((tuning.slot >= transitions).all()):
            break
    return module.Record(*(value[:transitions].movedim(-1, 0) for value in record))


# From the definition: momenta are kept, and every subtree is looked at in full.


class Chain:
    """One chain, leaf by leaf, with the random numbers of the tick."""

    def __init__(self, target: Target, q: Tensor, number: int, depth: int, step: float) -> None:
        self.target, self.depth, self.step = target, depth, step
        self.stream = streams(7, torch.tensor([number]))
        self.q, (self.momentum, self.forward) = q, (self.normals(0), self.luck(0))

    def normals(self, first: int) -> Tensor:
        return normals(self.stream, len(getattr(self, "q", torch.zeros(3))), first)[:, 0]

    def luck(self, place: int) -> float:
        return uniforms(self.stream, 1, place).item()

    def density(self, q: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.target(q.unsqueeze(1))
        return value.item(), gradient.squeeze(1)

    def transition(self) -> dict[str, Any]:
        """Make one; return what is recorded of it."""
        u, g = self.density(self.q)
        start = 0.5 * self.momentum.dot(self.momentum).item() - u
        tree = [(self.q, self.momentum, g, 0.0)]  # position, momentum, gradient, log weight
        proposal, forward = self.q, self.forward < 0.5
        accepted: list[float] = []
        depth, diverges, goes_on = 0, False, True
        while goes_on:
            subtree: list[Any] = []
            chosen, weight = self.q, -math.inf
            fails = False
            while len(subtree) < 2**depth and not fails:
                self.stream = self.stream._replace(tick=self.stream.tick + 1)
                q, r, g, _ = (subtree or tree[:: -1 if forward else 1])[-1 if subtree else 0]
                step = self.step if forward else -self.step
                half = r + 0.5 * step * g
                q = q + step * half
                u, g = self.density(q)
                r = half + 0.5 * step * g
                gain = start + u - 0.5 * r.dot(r).item()
                diverges = not gain > -1000.0
                gain = gain if not diverges else -1000.0
                weight = np.logaddexp(weight, gain)
                if self.luck(0) < math.exp(gain - weight):
                    chosen = q
                accepted.append(min(1.0, math.exp(gain)))
                subtree.append((q, r, g, gain))
                fails = diverges or turned_within([leaf[1] for leaf in subtree])
            complete = len(subtree) == 2**depth
            merges = complete and not fails
            depth += complete
            goes_on = False
            if merges:
                before = np.logaddexp.reduce([leaf[3] for leaf in tree])
                if self.luck(1) < math.exp(min(0.0, weight - before)):
                    proposal = chosen
                halves = ([leaf[1] for leaf in tree], [leaf[1] for leaf in subtree])
                if forward:
                    tree = tree + subtree
                else:
                    tree = subtree[::-1] + tree
                    halves = ([leaf[1] for leaf in subtree[::-1]], halves[0])
                goes_on = not turned(*halves) and depth < self.depth
                forward = self.luck(2) < 0.5
        self.q, self.momentum, self.forward = proposal, self.normals(3), self.luck(2)
        leaves = len(accepted)
        return {
            "q": proposal,
            "energy": start,
            "accept": sum(accepted) / leaves,
            "leaves": leaves,
            "depth": depth,
            "divergent": diverges,
        }


def turned(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two halves, in the order of time or against it, make a trajectory that turns."""

    def turns(start: Tensor, end: Tensor, rho: Tensor) -> bool:
        return bool(start.dot(rho) <= 0.0) or bool(end.dot(rho) <= 0.0)

    first, second = sum(left, torch.zeros(())), sum(right, torch.zeros(()))
    return (
        turns(left[0], right[-1], first + second)
        or turns(left[0], right[0], first + right[0])
        or turns(left[-1], right[-1], left[-1] + second)
    )


def turned_within(leaves: list[Tensor]) -> bool:
    """Whether the last leaf shows a subtree to have turned: one that it ends, or that it halves."""
    count, size = len(leaves), 2
    while count % size == 0:
        part = leaves[-size:]
        if turned(part[: size // 2], part[size // 2 :]):
            return True
        size *= 2
    if count % 2 == 1 and count > 1:  # the first leaf of a second half
        half = (count - 1) & -(count - 1)
        start, rho = leaves[-half - 1], sum(leaves[-half - 1 :], torch.zeros(()))
        return bool(start.dot(rho) <= 0.0) or bool(leaves[-1].dot(rho) <= 0.0)
    return False


CASES: dict[str, tuple[Target, float, int]] = {
    "normal": (normal, 0.35, 6),
    "stretched": (stretched, 0.1, 7),
    "short of depth": (normal, 0.05, 3),
    "gamma": (gamma, 0.4, 6),
    "diverging": (gamma, 2.5, 5),
}


def agrees(module: Any, name: str) -> bool:
    """Whether a tick is the definition, transition by transition."""
    target, step, depth = CASES[name]
    starts = 0.5 * normals(streams(3, torch.arange(4)), 3)
    record = sampled(target, starts, 40, depth=depth, step=step, module=module)
    for number in range(4):
        chain = Chain(target, starts[:, number], number, depth, step)
        for draw in range(40):
            for field, want in chain.transition().items():
                got = getattr(record, field)[number, draw]
                want = torch.as_tensor(want)
                if not torch.allclose(got.double(), want.double(), rtol=1e-8, atol=1e-8):
                    return False
    return True


@pytest.mark.parametrize("name", CASES)
def test_a_tick_is_the_no_u_turn_sampler(name: str) -> None:
    assert agrees(nuts, name)


def test_the_cases_reach_what_they_are_there_for() -> None:
    seen = {}
    for name, (target, step, depth) in CASES.items():
        starts = 0.5 * normals(streams(3, torch.arange(4)), 3)
        seen[name] = sampled(target, starts, 40, depth=depth, step=step)
    assert set(seen["normal"].depth.unique().tolist()) >= {2, 3, 4}
    assert (seen["short of depth"].depth == 3).all()
    assert seen["diverging"].divergent.any()
    leaves = seen["gamma"].leaves
    assert (leaves != 2 ** seen["gamma"].depth - 1).any()  # subtrees that were given up


MUTATIONS = {
    "weight": (
        "torch.where(is_first, gain, torch.logaddexp",
        "torch.where(is_first, gain, torch.maximum",
    ),
    "direction": ("_heads(luck[2])", "_heads(luck[2] + 0.1)"),
    "level of a mark": ("(leaf >> (bits + 1))", "(leaf >> (bits + 2))"),
    "marks of ended subtrees": ("(levels > level - ended)", "(levels >= level - ended)"),
    "sign of a momentum": ("inner_r + sub_rho", "sub_rho - inner_r"),
    "stale gradient": ("r = r + 0.5 * step * g", "r = r + 0.5 * step * s.g"),
    "stale energy": (
        "0.5 * (fresh * fresh).sum(0) - tree_u, s.energy)",
        "0.5 * (fresh * fresh).sum(0) - s.tree_u, s.energy)",
    ),
    "unbiased progress": (
        "torch.exp(sub_weight - s.tree_weight))",
        "torch.sigmoid(sub_weight - s.tree_weight))",
    ),
    "check across halves": ("| _turns(inner_r, r, far)", ""),
    "first half and a leaf": ("(ending | beginning)", "ending"),
    "second half and a leaf": ("| (across & odd_turns)", ""),
    "turning subtree taken": ("fails = diverges | turns", "fails = diverges"),
    "far end": ("moved(r, s.far_r, fresh)", "moved(r, s.r, fresh)"),
    "proposal of the tree": ("((sub_q, s.tree_q)", "((q, s.tree_q)"),
    "momentum drawn once": (
        "normals(stream, dim, first=3)",
        "normals(stream._replace(tick=0 * stream.tick), dim, first=3)",
    ),
    "depth": ("depth >= tuning.depth", "depth > tuning.depth"),
    "divergence": ("DIVERGENCE = 1000.0", "DIVERGENCE = 10.0"),
    "half a step": ("q = s.q + step * r", "q = s.q + 0.5 * step * r"),
}


@pytest.mark.parametrize("bug", MUTATIONS)
def test_a_bug_in_the_tick_is_found(bug: str) -> None:
    right, wrong = MUTATIONS[bug]
    source = Path(nuts.__file__).read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), vars(mutant))  # noqa: S102
    assert not all(agrees(mutant, name) for name in CASES)


# Exact targets: what starts at the truth stays there.


def test_one_transition_leaves_a_million_draws_of_a_skewed_target_where_they_were() -> None:
    generator = np.random.default_rng(1)
    start = torch.from_numpy(np.log(generator.gamma(2.0, size=(1, 1_000_000))))
    record = sampled(gamma, start, 1, depth=3, step=0.7)
    q = record.q[:, 0, 0]
    assert (q != start[0]).float().mean() > 0.9
    assert stats.kstest(np.exp(q.numpy()), stats.gamma(2.0).cdf).pvalue > 1e-3
    squares = torch.exp(2.0 * q)  # E = 6, Var = E[x^4] - 36 = 84
    assert abs(squares.mean().item() - 6.0) < 4 * math.sqrt(84e-6)


def test_one_transition_leaves_draws_of_five_dimensions_where_they_were() -> None:
    chains = 200_000
    covariance = torch.linalg.inv(_precision(5))
    noise = normals(streams(11, torch.arange(chains)), 5)
    start = torch.linalg.cholesky(covariance) @ noise
    q = sampled(normal, start, 1, depth=3, step=0.5).q[:, 0].T
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), q, upper=False)
    moments = (white @ white.T / chains - torch.eye(5)) * math.sqrt(chains)
    scale = torch.ones(5, 5) + torch.eye(5)  # variances: 2 on the diagonal, 1 beside it
    assert (moments.abs() < 4.5 * torch.sqrt(scale)).all()
    assert (white.mean(1).abs() < 4.5 / math.sqrt(chains)).all()
    assert stats.kstest(white.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3


def leapfrog(q: Tensor, r: Tensor, step: float, count: int) -> tuple[Tensor, Tensor]:
    """The moving end of chains after some ticks of one long trajectory."""
    chains = q.shape[1]
    stream = streams(1, torch.arange(chains))
    state = nuts.begin(q, normal, stream, 8)
    direction = torch.full((chains,), math.copysign(1.0, step))
    state = state._replace(r=r, far_r=r, direction=direction)
    record, tuning = blank(nuts, chains, len(q), 1, 8, abs(step))
    state = state._replace(size=torch.full((chains,), 128.0))  # that no tick completes
    for _ in range(count):
        state, stream, record, tuning = nuts.tick(state, stream, record, tuning, normal)
    return state.q, state.r


def test_leapfrog_steps_are_reversible_and_keep_volume() -> None:
    q, r = (normals(streams(seed, torch.arange(1)), 2) for seed in (1, 2))
    there = leapfrog(q, r, 0.1, 1)
    back = leapfrog(there[0], -there[1], 0.1, 1)
    assert torch.allclose(back[0], q, atol=1e-12)
    assert torch.allclose(back[1], -r, atol=1e-12)
    backward = leapfrog(*there, -0.1, 1)
    assert torch.allclose(backward[0], q, atol=1e-12)
    assert torch.allclose(backward[1], r, atol=1e-12)

    def flow(x: Tensor) -> Tensor:
        return torch.cat(leapfrog(x[:2], x[2:], 0.1, 1)).squeeze(1)

    jacobian = torch.autograd.functional.jacobian(flow, torch.cat([q, r])).squeeze(-1)
    assert abs(torch.det(jacobian).item() - 1.0) < 1e-12


# The random stream.


def test_the_stream_of_a_chain_depends_on_its_number_only() -> None:
    few, many = streams(5, torch.arange(3)), streams(5, torch.arange(100))
    assert torch.equal(normals(few, 7), normals(many, 7)[:, :3])
    assert torch.equal(uniforms(few, 3), uniforms(few, 9)[:3])


@pytest.mark.parametrize("vary", ["chains", "ticks", "places", "seeds"])
def test_numbers_along_every_direction_are_uniform_and_uncorrelated(vary: str) -> None:
    count = 200_000
    zero = torch.zeros(count, dtype=torch.int64)
    if vary == "chains":
        u = uniforms(streams(1, torch.arange(count)), 1)[0]
    elif vary == "ticks":
        one = streams(1, zero)
        u = uniforms(one._replace(tick=torch.arange(count)), 1)[0]
    elif vary == "places":
        u = uniforms(streams(1, zero[:1]), count)[:, 0]
    else:
        u = torch.cat([uniforms(streams(seed, zero[:1]), 1)[0] for seed in range(2_000)])
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    assert (u >= 0.0).all()
    assert (u < 1.0).all()
    centred = u - 0.5
    for lag in (1, 2, 3, 16):
        correlation = (centred[lag:] * centred[:-lag]).mean().item() * 12
        assert abs(correlation) < 4.5 / math.sqrt(len(u))
    assert torch.unique(u).numel() == len(u)


def test_normal_numbers_are_normal() -> None:
    z = normals(Stream(*streams(2, torch.arange(100_000))), 3)
    for row in z:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-3
    assert (torch.corrcoef(z) - torch.eye(3)).abs().max() < 4.5 / math.sqrt(100_000)
