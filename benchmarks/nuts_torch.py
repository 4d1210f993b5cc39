"""The torch side of `nuts.py`: `sample`, and Pyro's own NUTS; a process of its own.

Requests as in `processes.py`:

    ["versions"]
    ["prepare", "eight_schools", "Pyro JIT", "data.npz"]
    ["run", 64, 500, 500, 0, 1, "draws.npy"]    chains, draws, warm-up, seed, threads, where to
                                                write; seconds of the set-up, of warm-up and draws
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from nuts_cases import CASES, HIDDEN, LATENT
from processes import serve
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from ppl_models.infer import sample

LOOPED = 1  # rows that Pyro is asked for; the others would take as long


def normal(scale: float, *shape: int) -> Any:
    return dist.Normal(torch.zeros(shape), scale).to_event(len(shape))


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    t = pyro.sample("t", normal(1.0, 8))
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    pyro.sample("y", dist.Normal(mu + tau * t, sigma).to_event(1), obs=y)


def german_credit(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", normal(1.0, x.shape[-1]))
    pyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def german_hierarchical(x: Tensor, y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    t = pyro.sample("t", normal(1.0, x.shape[-1]))
    pyro.sample("y", dist.Bernoulli(logits=x @ (scale * t)).to_event(1), obs=y)


def gp_poisson(x: Tensor, k: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    white = pyro.sample("white", normal(1.0, len(x)))
    kernel = alpha**2 * torch.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    f = torch.linalg.cholesky(kernel + 1e-10 * torch.eye(len(x))) @ white
    pyro.sample("k", dist.Poisson(f.exp()).to_event(1), obs=k)


def ar_k(lags: Tensor, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", normal(10.0, lags.shape[-1]))
    noise = pyro.sample("noise", dist.HalfCauchy(2.5))
    pyro.sample("y", dist.Normal(alpha + lags @ beta, noise).to_event(1), obs=y)


def network(x: Tensor, y: Tensor) -> None:
    inputs = x.shape[-1]
    w1 = pyro.sample("w1", normal(inputs**-0.5, inputs, HIDDEN))
    b1 = pyro.sample("b1", normal(1.0, HIDDEN))
    w2 = pyro.sample("w2", normal(HIDDEN**-0.5, HIDDEN))
    b2 = pyro.sample("b2", dist.Normal(0.0, 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    pyro.sample("y", dist.Normal(torch.tanh(x @ w1 + b1) @ w2 + b2, noise).to_event(1), obs=y)


def vae(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(1.0, LATENT))
        logits = F.linear(torch.tanh(F.linear(z, w1, b1)), w2, b2)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


MODELS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "eight_schools": (eight_schools, ("y", "sigma")),
    "german_credit": (german_credit, ("x", "y")),
    "german_hierarchical": (german_hierarchical, ("x", "y")),
    "gp_poisson": (gp_poisson, ("x", "k")),
    "arK": (ar_k, ("lags", "y")),
    "network": (network, ("x", "y")),
    "vae": (vae, ("w1", "b1", "w2", "b2", "x")),
}


class Sampler:
    """One of the samplers, on one posterior."""

    def prepare(self, case: str, who: str, path: str) -> None:
        self.case, self.who = CASES[case], who
        self.arrays = dict(np.load(path))
        program, names = MODELS[case]
        values = [torch.as_tensor(self.arrays[name]) for name in names]
        kept = 1 if self.case.rows else len(names)  # a row-wise model is given its rows only
        self.model = partial(program, *values[:-kept]) if self.case.rows else program
        self.data = tuple(values[-kept:])

    def run(
        self, chains: int, draws: int, warmup: int, seed: int, threads: int, path: str
    ) -> dict[str, Any]:
        torch.set_num_threads(threads)
        run = self._ours if self.who == "ppl_models" else self._pyro
        found, values = run(chains, draws, warmup, seed)
        np.save(path, self.case.measure(values, self.arrays))
        return found

    def _ours(self, chains: int, draws: int, warmup: int, seed: int) -> tuple[Any, Any]:
        posterior = sample(
            self.model, *self.data, chains=chains, draws=draws, warmup=warmup, seed=seed,
            rows=bool(self.case.rows), progress=False, compile="now",
        )  # fmt: skip
        told = posterior.warmup_seconds + posterior.sampling_seconds
        found = {
            "set_up": posterior.seconds - told,
            "warmup": posterior.warmup_seconds,
            "sampling": posterior.sampling_seconds,
            "divergences": int(posterior.divergences.sum()),
        }
        return found, {name: value.numpy() for name, value in posterior.items()}

    def _pyro(self, chains: int, draws: int, warmup: int, seed: int) -> tuple[Any, Any]:
        rows, data = self.case.rows, self.data
        if rows:  # one by one, in a loop
            data, rows = tuple(value[:LOOPED] for value in data), LOOPED
        pyro.set_rng_seed(seed)
        jit = self.who == "Pyro JIT"
        clock = [time.perf_counter()]
        spent = {"Warmup": 0.0, "Sample": 0.0}

        def watch(kernel: Any, params: Any, stage: str, number: int) -> None:
            # The first transition of a chain includes what sets it up; the hook follows it.
            now = time.perf_counter()
            spent["Sample" if stage.startswith("Sample") else "Warmup"] += now - clock[0]
            clock[0] = now

        parts: list[dict[str, Any]] = []
        divergences = 0
        for _ in range(chains):  # several chains are processes, which would share the threads
            kernel = PyroNUTS(self.model, jit_compile=jit, ignore_jit_warnings=True)
            sampler = MCMC(kernel, draws, warmup, disable_progbar=True, hook_fn=watch)
            clock[0] = time.perf_counter()
            sampler.run(*data)
            parts.append(sampler.get_samples())
            divergences += sum(map(len, sampler.diagnostics()["divergences"].values()))
        factor = self.case.rows / rows if rows else 1.0
        found = {
            "set_up": 0.0,
            "warmup": factor * spent["Warmup"],
            "sampling": factor * spent["Sample"],
            "divergences": divergences,
            "rows": rows,
        }
        return found, {name: np.stack([part[name].numpy() for part in parts]) for name in parts[0]}


def main() -> None:
    """Answer line by line."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    sampler = Sampler()
    serve(
        {
            "versions": lambda: f"torch {torch.__version__}, Pyro {pyro.__version__}",
            "prepare": sampler.prepare,
            "run": sampler.run,
        }
    )


if __name__ == "__main__":
    main()
