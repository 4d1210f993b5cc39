"""NumPyro and BlackJAX for `nuts.py`: a process of its own, for an environment without torch.

Requests as in `nuts_torch.py`. Both sample the same NumPyro model in float64. Chains are vectorised:
NumPyro's by `chain_method="vectorized"`, BlackJAX's by `vmap` over its window adaptation and over
its chains. Rows that are targets of their own are another `vmap`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import numpy as np
import numpyro  # pyright: ignore[reportMissingImports]
import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]
from jax import numpy as jnp  # pyright: ignore[reportMissingImports]
from numpyro.infer import MCMC, NUTS  # pyright: ignore[reportMissingImports]
from numpyro.infer.util import initialize_model  # pyright: ignore[reportMissingImports]
from nuts_cases import CASES, HIDDEN, LATENT
from processes import serve


def normal(scale: float, *shape: int) -> Any:
    return dist.Normal(jnp.zeros(shape), scale).to_event(len(shape))


def eight_schools(y: Any, sigma: Any) -> None:
    t = numpyro.sample("t", normal(1.0, 8))
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    numpyro.sample("y", dist.Normal(mu + tau * t, sigma).to_event(1), obs=y)


def german_credit(x: Any, y: Any) -> None:
    w = numpyro.sample("w", normal(1.0, x.shape[-1]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def german_hierarchical(x: Any, y: Any) -> None:
    scale = numpyro.sample("scale", dist.HalfCauchy(1.0))
    t = numpyro.sample("t", normal(1.0, x.shape[-1]))
    numpyro.sample("y", dist.Bernoulli(logits=x @ (scale * t)).to_event(1), obs=y)


def gp_poisson(x: Any, k: Any) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    white = numpyro.sample("white", normal(1.0, len(x)))
    kernel = alpha**2 * jnp.exp(-0.5 * (x[:, None] - x) ** 2 / rho**2)
    f = jnp.linalg.cholesky(kernel + 1e-10 * jnp.eye(len(x))) @ white
    numpyro.sample("k", dist.Poisson(jnp.exp(f)).to_event(1), obs=k)


def ar_k(lags: Any, y: Any) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", normal(10.0, lags.shape[-1]))
    noise = numpyro.sample("noise", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + lags @ beta, noise).to_event(1), obs=y)


def network(x: Any, y: Any) -> None:
    inputs = x.shape[-1]
    w1 = numpyro.sample("w1", normal(inputs**-0.5, inputs, HIDDEN))
    b1 = numpyro.sample("b1", normal(1.0, HIDDEN))
    w2 = numpyro.sample("w2", normal(HIDDEN**-0.5, HIDDEN))
    b2 = numpyro.sample("b2", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(jnp.tanh(x @ w1 + b1) @ w2 + b2, noise).to_event(1), obs=y)


def vae(w1: Any, b1: Any, w2: Any, b2: Any, x: Any) -> None:
    """One row, of which `vmap` makes many."""
    z = numpyro.sample("z", normal(1.0, LATENT))
    logits = jnp.tanh(z @ w1.T + b1) @ w2.T + b2
    numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


MODELS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "eight_schools": (eight_schools, ("y", "sigma")),
    "german_credit": (german_credit, ("x", "y")),
    "german_hierarchical": (german_hierarchical, ("x", "y")),
    "gp_poisson": (gp_poisson, ("x", "k")),
    "arK": (ar_k, ("lags", "y")),
    "network": (network, ("x", "y")),
    "vae": (vae, ("w1", "b1", "w2", "b2", "x")),
}
# Seconds of warm-up and of draws, divergences, and the draws (chains, draws, ...).
Run = tuple[float, float, int, dict[str, np.ndarray]]


class Sampler:
    """One of the samplers, on one posterior; what it has compiled serves the next run."""

    def prepare(self, case: str, who: str, path: str) -> None:
        self.case, self.who = CASES[case], who
        self.arrays = dict(np.load(path))
        self.model, names = MODELS[case]
        self.data = tuple(jnp.asarray(self.arrays[name]) for name in names)
        self.made: dict[tuple[int, ...], Callable[[int], Run]] = {}

    def run(
        self, chains: int, draws: int, warmup: int, seed: int, threads: int, path: str
    ) -> dict[str, Any]:
        made = self.made.get((chains, draws, warmup))
        if made is None:
            make = {"NumPyro": self._numpyro, "BlackJAX": self._blackjax}[self.who]
            made = self.made[chains, draws, warmup] = make(chains, draws, warmup)
        warm, sampling, divergences, values = made(seed)
        np.save(path, self.case.measure(values, self.arrays))
        return {"set_up": 0.0, "warmup": warm, "sampling": sampling, "divergences": divergences}

    def _numpyro(self, chains: int, draws: int, warmup: int) -> Callable[[int], Run]:
        *fixed, x = self.data if self.case.rows else (*self.data, None)
        targets = (x,) if self.case.rows else ()

        def sampler() -> Any:
            return MCMC(
                NUTS(self.model), num_warmup=warmup, num_samples=draws, num_chains=chains,
                chain_method="vectorized", progress_bar=False,
            )  # fmt: skip

        def adapt(key: Any, *row: Any) -> Any:
            one = sampler()
            one.warmup(key, *fixed, *row)
            return one.post_warmup_state

        def draw(key: Any, state: Any, *row: Any) -> Any:
            one = sampler()
            one.post_warmup_state = state
            one.run(key, *fixed, *row)
            return one.get_samples(group_by_chain=True), one.get_extra_fields()["diverging"]

        def of_all(function: Any) -> Any:
            return jax.jit(jax.vmap(function) if targets else function)

        adapt_all, draw_all = of_all(adapt), of_all(draw)

        def run(seed: int) -> Run:
            one, two = jax.random.split(jax.random.key(seed))
            if targets:
                one, two = (jax.random.split(key, len(x)) for key in (one, two))
            start = time.perf_counter()
            state = jax.block_until_ready(adapt_all(one, *targets))
            warm = time.perf_counter()
            found, lost = jax.block_until_ready(draw_all(two, state, *targets))
            end = time.perf_counter()
            values = {name: np.asarray(value) for name, value in found.items()}
            if targets:
                values = {name: np.moveaxis(value, 0, 2) for name, value in values.items()}
            return warm - start, end - warm, int(lost.sum()), values

        return run

    def _blackjax(self, chains: int, draws: int, warmup: int) -> Callable[[int], Run]:
        import blackjax  # pyright: ignore[reportMissingImports]

        *fixed, x = self.data if self.case.rows else (*self.data, None)
        targets = (x,) if self.case.rows else ()

        def density(*row: Any) -> tuple[Any, Any, Any]:
            """Return where to start, the potential, and what constrains, of a target."""
            info = initialize_model(
                row[0], self.model, model_args=(*fixed, *row[1:]), dynamic_args=False
            )
            return info.param_info.z, info.potential_fn, info.postprocess_fn

        def adapt(key: Any, *row: Any) -> Any:
            one, two = jax.random.split(key)
            z, potential, _ = density(one, *row)
            adaptation = blackjax.window_adaptation(
                blackjax.nuts, lambda u: -potential(u), target_acceptance_rate=0.8
            )
            (state, parameters), _ = adaptation.run(two, z, num_steps=warmup)
            return state, parameters

        def draw(key: Any, learnt: Any, *row: Any) -> Any:
            state, parameters = learnt
            _, potential, constrain = density(jax.random.key(0), *row)
            kernel = blackjax.nuts(lambda u: -potential(u), **parameters)

            def step(state: Any, key: Any) -> Any:
                state, info = kernel.step(key, state)
                return state, (state.position, info.is_divergent)

            _, (u, lost) = lax.scan(step, state, jax.random.split(key, draws))
            return jax.vmap(constrain)(u), lost

        def of_all(function: Any, mapped: int) -> Any:
            """Map over chains, and over rows outside of them."""
            inner = jax.vmap(function, (0,) * mapped + (None,) * len(targets))
            return jax.jit(jax.vmap(inner) if targets else inner)

        adapt_all, draw_all = of_all(adapt, 1), of_all(draw, 2)
        shape = (*(len(x) for x in targets), chains)

        def run(seed: int) -> Run:
            one, two = jax.random.split(jax.random.key(seed))
            start = time.perf_counter()
            learnt = jax.block_until_ready(adapt_all(jax.random.split(one, shape), *targets))
            warm = time.perf_counter()
            keys = jax.random.split(two, shape)
            found, lost = jax.block_until_ready(draw_all(keys, learnt, *targets))
            end = time.perf_counter()
            values = {name: np.asarray(value) for name, value in found.items()}
            if targets:
                values = {name: np.moveaxis(value, 0, 2) for name, value in values.items()}
            return warm - start, end - warm, int(lost.sum()), values

        return run


def versions() -> str:
    packages = ("jax", "numpyro", "blackjax")
    return ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name))


def main() -> None:
    """Answer line by line."""
    jax.config.update("jax_enable_x64", True)
    sampler = Sampler()
    serve({"versions": versions, "prepare": sampler.prepare, "run": sampler.run})


if __name__ == "__main__":
    main()
