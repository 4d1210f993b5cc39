"""The torch side of `step.py`: vanilla Pyro, hand-written torch and `fit`.

    python benchmarks/step_torch.py "fit compiled" small regression

takes the first two steps of each of these cases, in this order, in a process that has compiled
nothing before, and prints the seconds of each as JSON. `step.py` calls it with caches of its own.
"""

from __future__ import annotations

import abc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.elbo import ELBO as PyroELBO
from step_cases import CASES, COMPONENTS, Case
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from ppl_models.core.random import seeded, unique_name
from ppl_models.infer import fit

EVALUATIONS = 10  # estimates of the bound of all rows, to be averaged
LOG_TWO_PI = math.log(2 * math.pi)


def make_data(case: Case) -> tuple[Tensor, ...]:
    """Simulate the data set of a case."""
    with seeded(0):
        if case.kind == "vae":
            features = case.widths[0]
            logits = torch.randn(case.rows, 4) @ torch.randn(4, features)
            return (torch.bernoulli(logits.sigmoid()),)
        if case.kind == "regression":
            x = torch.randn(case.rows)
            return x, 1 + 2 * x + torch.randn(case.rows)
        centre = torch.tensor([-4.0, 0.0, 3.0])[torch.randint(COMPONENTS, (case.rows,))]
        return (centre + torch.randn(case.rows),)


# The same parameters for all: nets by the module, others by name, scales above 0.


class Nets(nn.Module):
    """Encoder and decoder of a VAE: one tanh layer each, as in `ppl_models.VAE`."""

    def __init__(self, features: int, hidden: int, latent: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, features)
        )


def make_nets(case: Case) -> Nets:
    """Build the nets of a VAE, with the same weights at each call."""
    with seeded(1):
        return Nets(*case.widths)


def numbers(case: Case) -> dict[str, Tensor]:
    """Where the guide's numbers start in a case without nets."""
    if case.kind == "regression":
        start = {name: (torch.tensor(0.0), torch.tensor(0.1)) for name in ("a", "b")}
    else:
        tenth = torch.full((COMPONENTS,), 0.1)
        start = {
            "logits": (torch.zeros(COMPONENTS), tenth),
            "centre": (torch.tensor([-2.0, 0.0, 2.0]), tenth),
            "width": (torch.zeros(COMPONENTS), tenth),
        }
    return {
        f"{name}_{what}": value
        for name, pair in start.items()
        for what, value in zip(("loc", "scale"), pair, strict=True)
    }


def start(case: Case) -> dict[str, Tensor]:
    """All parameters by name, where every variant starts."""
    if case.kind != "vae":
        return numbers(case)
    return {name: value.detach() for name, value in make_nets(case).named_parameters()}


# The same program for vanilla Pyro and for `fit`. Functions and `pyro.param`, as Pyro's own
# examples write them: what SVI is fastest at.

Program = Callable[..., Any]


def make_programs(case: Case, name: str, device: str) -> tuple[Program, Program, PyroELBO]:
    """Write model and guide in Pyro, with parameters under `name` in its store."""
    if case.kind == "vae":
        return *_vae(make_nets(case).to(device), name, case.widths[2]), Trace_ELBO()
    values = {key: value.to(device) for key, value in numbers(case).items()}

    def q(site: str) -> tuple[Tensor, Tensor]:
        loc = pyro.param(f"{name}.{site}_loc", values[f"{site}_loc"].clone)
        scale = pyro.param(
            f"{name}.{site}_scale", values[f"{site}_scale"].clone, constraint=constraints.positive
        )
        return loc, scale

    if case.kind == "regression":
        return *_regression(q), Trace_ELBO()
    return *_mixture(q), TraceEnum_ELBO(max_plate_nesting=1)


def _vae(nets: Nets, name: str, latent: int) -> tuple[Program, Program]:
    def model(x: Tensor) -> None:
        decoder = pyro.module(f"{name}.decoder", nets.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        encoder = pyro.module(f"{name}.encoder", nets.encoder)
        with pyro.plate("data", len(x)):
            loc, log_square = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, (log_square / 2).exp()).to_event(1))

    return model, guide


def _regression(q: Callable[[str], tuple[Tensor, Tensor]]) -> tuple[Program, Program]:
    def model(x: Tensor, y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x.new_zeros(()), 10.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("a", dist.Normal(*q("a")))
        pyro.sample("b", dist.Normal(*q("b")))

    return model, guide


def _mixture(q: Callable[[str], tuple[Tensor, Tensor]]) -> tuple[Program, Program]:
    def model(x: Tensor) -> None:
        zeros = x.new_zeros(COMPONENTS)
        logits = pyro.sample("logits", dist.Normal(zeros, 1.0).to_event(1))
        centre = pyro.sample("centre", dist.Normal(zeros, 5.0).to_event(1))
        width = pyro.sample("width", dist.LogNormal(zeros, 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            each = dist.Categorical(logits=logits)
            k = pyro.sample("k", each, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(centre[k], width[k]), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("logits", dist.Normal(*q("logits")).to_event(1))
        pyro.sample("centre", dist.Normal(*q("centre")).to_event(1))
        pyro.sample("width", dist.LogNormal(*q("width")).to_event(1))

    return model, guide


# The same bound by hand: minus the ELBO, nats per row.


class HandVAE(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.nets = make_nets(case)

    def forward(self, x: Tensor) -> Tensor:
        loc, log_square = self.nets.encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + (log_square / 2).exp() * noise
        misfit = functional.binary_cross_entropy_with_logits(
            self.nets.decoder(z), x, reduction="sum"
        )
        return (misfit + 0.5 * (z * z - noise * noise - log_square).sum()) / len(x)


class HandNumbers(nn.Module):
    """A guide of normals: loc and log_scale for each latent."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.guide = nn.ParameterDict(
            {
                name.replace("scale", "log_scale"): value.log() if "scale" in name else value
                for name, value in numbers(case).items()
            }
        )

    def draw(self, site: str, prior_scale: float) -> tuple[Tensor, Tensor]:
        """Draw a latent, and return log q(w) - log p(w) too, for the prior N(0, prior_scale)."""
        loc, log_scale = self.guide[f"{site}_loc"], self.guide[f"{site}_log_scale"]
        noise = torch.randn_like(loc)
        w = loc + log_scale.exp() * noise
        difference = 0.5 * ((w / prior_scale) ** 2 - noise**2) - log_scale + math.log(prior_scale)
        return w, difference.sum()


class HandRegression(HandNumbers):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, of_a = self.draw("a", 10.0)
        b, of_b = self.draw("b", 10.0)
        misfit = 0.5 * ((y - a - b * x) ** 2).sum() + 0.5 * len(x) * LOG_TWO_PI
        return (misfit + of_a + of_b) / len(x)


class HandMixture(HandNumbers):
    def forward(self, x: Tensor) -> Tensor:
        logits, of_logits = self.draw("logits", 1.0)
        centre, of_centre = self.draw("centre", 5.0)
        log_width, of_width = self.draw("width", 1.0)  # the Jacobians of p and q cancel
        z = (x - centre[:, None]) / log_width.exp()[:, None]
        weight = (logits.log_softmax(0) - log_width)[:, None]
        each = torch.logsumexp(weight - 0.5 * z**2, dim=0) - 0.5 * LOG_TWO_PI
        return (of_logits + of_centre + of_width - each.sum()) / len(x)


HAND = {"vae": HandVAE, "regression": HandRegression, "mixture": HandMixture}


class Variant(abc.ABC):
    """One way to train one case."""

    how = ""  # what it says of itself, if it chooses

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = device
        self.data = tuple(value.to(device) for value in make_data(case))

    @abc.abstractmethod
    def train(self, steps: int) -> None:
        """Take steps."""

    @abc.abstractmethod
    def one_bound(self) -> float:
        """Estimate the bound of all rows, in nats per row."""

    @abc.abstractmethod
    def size(self) -> int:
        """Count the parameters."""

    def seconds(self, steps: int) -> float:
        """Take steps, and return the time they took."""
        began = time.perf_counter()
        self.train(steps)
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def bound(self) -> tuple[float, float]:
        """Return the bound of all rows, nats per row, and its standard error."""
        each = torch.tensor([self.one_bound() for _ in range(EVALUATIONS)])
        return each.mean().item(), each.std().item() / EVALUATIONS**0.5

    def _indices(self, steps: int) -> Iterator[Tensor | None]:
        """Shuffle for each epoch, as `fit` does; its last batch is what is left."""
        if self.case.batch == self.case.rows:
            for _ in range(steps):
                yield None
        while steps > 0 and self.case.batch < self.case.rows:
            part = torch.randperm(self.case.rows).to(self.device).split(self.case.batch)[:steps]
            yield from part
            steps -= len(part)


class InPyro(Variant):
    """What vanilla Pyro and `fit` share: the programs."""

    def __init__(self, case: Case, device: str, name: str) -> None:
        super().__init__(case, device)
        self.name = unique_name(name)  # the store would hand it the parameters of another case
        self.model, self.guide, self.elbo = make_programs(case, self.name, device)
        with torch.no_grad():
            self.one_bound()  # makes the parameters

    def one_bound(self) -> float:
        elbo: Any = self.elbo
        with torch.no_grad():
            return -float(elbo.loss(self.model, self.guide, *self.data)) / self.case.rows

    def size(self) -> int:
        store = pyro.get_param_store()
        return sum(v.numel() for name, v in store.items() if name.startswith(f"{self.name}."))


class Vanilla(InPyro):
    """`pyro.infer.SVI`, its step in a loop."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, "vanilla")
        adam = pyro.optim.Adam({"lr": case.lr})  # pyright: ignore[reportAttributeAccessIssue]
        self.svi = SVI(self.model, self.guide, adam, self.elbo)

    def train(self, steps: int) -> None:
        losses = []
        for index in self._indices(steps):
            batch = self.data if index is None else tuple(v[index] for v in self.data)
            losses.append(self.svi.step(*batch))


class Hand(Variant):
    """Torch without Pyro: the bound by hand, a fused Adam."""

    def __init__(self, case: Case, device: str, *, compiled: bool) -> None:
        super().__init__(case, device)
        self.module = HAND[case.kind](case).to(device)
        self.adam = torch.optim.Adam(self.module.parameters(), lr=case.lr, fused=True)
        # Shapes are static: two graphs, for the batch and for the last one of an epoch.
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, index: Tensor | None) -> Tensor:
        if index is None:
            return self.module(*self.data)
        return self.module(*(value.index_select(0, index) for value in self.data))

    def train(self, steps: int) -> None:
        losses = []
        for index in self._indices(steps):
            self.adam.zero_grad()
            loss = self.loss(index)
            loss.backward()
            self.adam.step()
            losses.append(loss.detach())

    def one_bound(self) -> float:
        with torch.no_grad():
            return -self._loss(None).item()

    def size(self) -> int:
        return sum(value.numel() for value in self.module.parameters())


class HandFunctional(Hand):
    """The same with `torch.func`: loss and gradients in one graph, no autograd at run time."""

    def __init__(self, case: Case, device: str) -> None:
        super().__init__(case, device, compiled=False)
        self.leaves = dict(self.module.named_parameters())
        self.values = {name: leaf.detach() for name, leaf in self.leaves.items()}
        self.gradients = torch.compile(torch.func.grad_and_value(self._functional), dynamic=False)

    def _functional(self, values: dict[str, Tensor], index: Tensor | None) -> Tensor:
        batch = self.data
        if index is not None:
            batch = tuple(value.index_select(0, index) for value in batch)
        return torch.func.functional_call(self.module, values, batch)

    def train(self, steps: int) -> None:
        losses = []
        for index in self._indices(steps):
            gradients, loss = self.gradients(self.values, index)
            for name, leaf in self.leaves.items():
                leaf.grad = gradients[name]
            self.adam.step()
            losses.append(loss)


class Ours(InPyro):
    """`ppl_models.infer.fit` on the programs of `Vanilla`; `seconds` has its set-up in it."""

    def __init__(self, case: Case, device: str, *, rung: str) -> None:
        super().__init__(case, device, f"ours-{rung}")
        self.rung = rung

    def train(self, steps: int) -> None:
        self._fit(steps, [])

    def pace(self) -> tuple[float, float]:
        """Return seconds of set-up and of a step, roughly: from when each step of a run ended."""
        steps = 4 * math.ceil(self.case.rows / self.case.batch)
        while True:
            ends: list[float] = []
            began = time.perf_counter()
            self._fit(steps, [lambda step, bound, ends=ends: ends.append(time.perf_counter())])
            total = time.perf_counter() - began
            late = ends[steps // 2 :]  # compiled by then, the last batch of an epoch too
            if late[-1] - late[0] > 0.05:
                step = (late[-1] - late[0]) / (len(late) - 1)
                return total - steps * step, step
            steps *= 4

    def _fit(self, steps: int, callbacks: Sequence[Callable[[int, float], Any]]) -> None:
        # No compiler: the traced graph is the last rung then.
        compiler = {"PPL_MODELS_COMPILER": "none"} if self.rung == "traced" else {}
        os.environ.update(compiler)
        try:
            result = fit(
                self.model,
                self.guide,
                self.data,
                objective=None if isinstance(self.elbo, Trace_ELBO) else self.elbo,
                steps=steps,
                batch_size=self.case.batch,
                lr=self.case.lr,
                compile=False if self.rung == "eager" else "now",
                progress=False,
                callbacks=callbacks,
                device=None if self.device == "cpu" else self.device,
            )
        finally:
            for name in compiler:
                del os.environ[name]
        self.how = result.compiled


VARIANTS: dict[str, Callable[[Case, str], Variant]] = {
    "vanilla": Vanilla,
    "fit eager": lambda case, device: Ours(case, device, rung="eager"),
    "fit traced": lambda case, device: Ours(case, device, rung="traced"),
    "fit compiled": lambda case, device: Ours(case, device, rung="compiled"),
    "hand eager": lambda case, device: Hand(case, device, compiled=False),
    "hand compiled": lambda case, device: Hand(case, device, compiled=True),
    "hand functional": HandFunctional,
}


def main() -> None:
    """Take the first compiled step of each case asked for, and print the seconds."""
    who, *names = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    make = VARIANTS[who]
    # Two steps: `fit` records the programs at the first, and the second is compiled.
    print(json.dumps([make(CASES[name], "cpu").seconds(2) for name in names]))


if __name__ == "__main__":
    main()
