"""nutpie for `nuts.py`: PyMC models compiled by numba, in a process of its own without torch.

Requests as in `nuts_torch.py`. nutpie does not tell warm-up and draws apart: the time of the draws
is what a run with the same seed, and so the same warm-up, takes longer for more of them. The rest,
handing over included, is that of the warm-up. Rows that are targets of their own are a loop, over
the first `LOOPED` of them: the others would take as long.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import nutpie  # pyright: ignore[reportMissingImports]
import pymc as pm  # pyright: ignore[reportMissingImports]
import pytensor.tensor as pt  # pyright: ignore[reportMissingImports]
from nuts_cases import CASES, HIDDEN, LATENT
from processes import serve

LOOPED = 20
LONGER = 10  # times as many draws more in a short run, whose difference would drown in noise


def eight_schools(y: Any, sigma: Any) -> None:
    t = pm.Normal("t", 0.0, 1.0, shape=8)
    mu = pm.Normal("mu", 0.0, 5.0)
    tau = pm.HalfCauchy("tau", 5.0)
    pm.Normal("y", mu + tau * t, sigma, observed=y)


def german_credit(x: Any, y: Any) -> None:
    w = pm.Normal("w", 0.0, 1.0, shape=x.shape[-1])
    pm.Bernoulli("y", logit_p=x @ w, observed=y)


def german_hierarchical(x: Any, y: Any) -> None:
    scale = pm.HalfCauchy("scale", 1.0)
    t = pm.Normal("t", 0.0, 1.0, shape=x.shape[-1])
    pm.Bernoulli("y", logit_p=x @ (scale * t), observed=y)


def gp_poisson(x: Any, k: Any) -> None:
    rho = pm.Gamma("rho", 25.0, 4.0)
    alpha = pm.HalfNormal("alpha", 2.0)
    white = pm.Normal("white", 0.0, 1.0, shape=len(x))
    kernel = alpha**2 * pt.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    f = pt.linalg.cholesky(kernel + 1e-10 * np.eye(len(x))) @ white
    pm.Poisson("k", pt.exp(f), observed=k)


def ar_k(lags: Any, y: Any) -> None:
    alpha = pm.Normal("alpha", 0.0, 10.0)
    beta = pm.Normal("beta", 0.0, 10.0, shape=lags.shape[-1])
    noise = pm.HalfCauchy("noise", 2.5)
    pm.Normal("y", alpha + lags @ beta, noise, observed=y)


def network(x: Any, y: Any) -> None:
    inputs = x.shape[-1]
    w1 = pm.Normal("w1", 0.0, inputs**-0.5, shape=(inputs, HIDDEN))
    b1 = pm.Normal("b1", 0.0, 1.0, shape=HIDDEN)
    w2 = pm.Normal("w2", 0.0, HIDDEN**-0.5, shape=HIDDEN)
    b2 = pm.Normal("b2", 0.0, 1.0)
    noise = pm.HalfNormal("noise", 1.0)
    pm.Normal("y", pt.tanh(x @ w1 + b1) @ w2 + b2, noise, observed=y)


def vae(w1: Any, b1: Any, w2: Any, b2: Any, x: Any) -> None:
    row = pm.Data("row", x[0])
    z = pm.Normal("z", 0.0, 1.0, shape=LATENT)
    pm.Bernoulli("x", logit_p=pt.tanh(z @ w1.T + b1) @ w2.T + b2, observed=row)


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
    """nutpie on one posterior."""

    def prepare(self, case: str, who: str, path: str) -> None:
        self.case = CASES[case]
        self.arrays = dict(np.load(path))
        program, names = MODELS[case]
        with pm.Model() as self.model:
            program(*(self.arrays[name] for name in names))
        self.compiled: Any = None

    def run(
        self, chains: int, draws: int, warmup: int, seed: int, threads: int, path: str
    ) -> dict[str, Any]:
        start = time.perf_counter()
        if self.compiled is None:
            self.compiled = nutpie.compile_pymc_model(self.model)
        set_up = time.perf_counter() - start
        rows = min(LOOPED, self.case.rows)
        targets = [self.compiled]
        if rows:
            targets = [self.compiled.with_data(row=x) for x in self.arrays["x"][:rows]]
        whole, sampling, divergences = 0.0, 0.0, 0
        parts: list[dict[str, Any]] = []
        for number, target in enumerate(targets):

            def take(many: int, target: Any = target, number: int = number) -> tuple[float, Any]:
                start = time.perf_counter()
                trace = nutpie.sample(
                    target, draws=many, tune=warmup, chains=chains, cores=threads,
                    seed=1000 * seed + number, progress_bar=False, save_warmup=False,
                )  # fmt: skip
                return time.perf_counter() - start, trace

            took, trace = take(draws)
            many = LONGER if took < 1.0 else 1
            longer, _ = take((1 + many) * draws)
            whole += took
            sampling += max((longer - took) / many, 0.01 * took)
            divergences += int(np.asarray(trace.sample_stats.diverging).sum())
            names = [variable.name for variable in self.model.free_RVs]
            parts.append({name: np.asarray(trace.posterior[name]) for name in names})
        values = {name: np.stack([part[name] for part in parts], 2) for name in parts[0]}
        if not rows:
            values = {name: value[:, :, 0] for name, value in values.items()}
        np.save(path, self.case.measure(values, self.arrays))
        factor = self.case.rows / rows if rows else 1.0
        return {
            "set_up": set_up,
            "warmup": factor * (whole - sampling),
            "sampling": factor * sampling,
            "divergences": divergences,
            "rows": rows,
        }


def main() -> None:
    """Answer line by line."""
    warnings.simplefilter("ignore")
    sampler = Sampler()
    about = f"nutpie {nutpie.__version__}, PyMC {pm.__version__}"
    serve({"versions": lambda: about, "prepare": sampler.prepare, "run": sampler.run})


if __name__ == "__main__":
    main()
