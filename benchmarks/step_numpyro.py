"""The NumPyro side of `step.py`: a process of its own, for an environment that has no torch.

Each line on stdin is a request in JSON, `[name, *arguments]`, and each line on stdout its answer:

    ["versions"]                                  versions of NumPyro and jax
    ["prepare", "small", "start.npz"]             count of parameters; data and start in the file
    ["bound", "small", "loop"]                    bound of all rows, nats per row, and its error
    ["seconds", "small", "loop", 500]             seconds of 500 steps, or null: it cannot
    ["first", "small"]                            seconds of the first two jitted steps, compiling

The two ways to train, `loop` (jitted `svi.update`, called from Python) and `scan` (`lax.scan` over
many steps, jitted), are trained on their own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax  # pyright: ignore[reportMissingImports]
import numpy as np
import numpyro  # pyright: ignore[reportMissingImports]
import numpyro.distributions as dist  # pyright: ignore[reportMissingImports]
from jax import lax  # pyright: ignore[reportMissingImports]
from jax import numpy as jnp  # pyright: ignore[reportMissingImports]
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO  # pyright: ignore[reportMissingImports]
from step_cases import CASES, COMPONENTS, Case

EVALUATIONS = 10  # as in step_torch.py

Program = Callable[..., Any]
Start = dict[str, Any]


def make_programs(case: Case, start: Start) -> tuple[Program, Program, Any]:
    """Write model and guide: those of step_torch.py, with the same names of parameters."""
    if case.kind == "vae":
        return *_vae(case, start), Trace_ELBO()
    q = partial(_numbers, start)
    if case.kind == "regression":
        return *_regression(q), Trace_ELBO()
    import funsor  # noqa: F401  # pyright: ignore[reportMissingImports] - what enumerates

    return *_mixture(q), TraceEnum_ELBO(max_plate_nesting=1)


def _net(start: Start, name: str, inputs: Any) -> Any:
    """Run a tanh layer and a linear one; torch keeps a weight as (outputs, inputs)."""

    def linear(layer: int, value: Any) -> Any:
        weight, bias = f"{name}.{layer}.weight", f"{name}.{layer}.bias"
        weight = numpyro.param(weight, start[weight].T)
        return value @ weight + numpyro.param(bias, start[bias])

    return linear(2, jnp.tanh(linear(0, inputs)))


def _vae(case: Case, start: Start) -> tuple[Program, Program]:
    latent = case.widths[2]

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(latent), 1.0).to_event(1))
            logits = _net(start, "decoder", z)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Any) -> None:
        loc, log_square = jnp.split(_net(start, "encoder", x), 2, -1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_square / 2)).to_event(1))

    return model, guide


def _numbers(start: Start, site: str) -> tuple[Any, Any]:
    loc, scale = f"{site}_loc", f"{site}_scale"
    positive = dist.constraints.positive
    return (
        numpyro.param(loc, start[loc]),
        numpyro.param(scale, start[scale], constraint=positive),
    )


def _regression(q: Callable[[str], tuple[Any, Any]]) -> tuple[Program, Program]:
    def model(x: Any, y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0.0, 10.0))
        b = numpyro.sample("b", dist.Normal(0.0, 10.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(a + b * x, 1.0), obs=y)

    def guide(x: Any, y: Any) -> None:
        numpyro.sample("a", dist.Normal(*q("a")))
        numpyro.sample("b", dist.Normal(*q("b")))

    return model, guide


def _mixture(q: Callable[[str], tuple[Any, Any]]) -> tuple[Program, Program]:
    def model(x: Any) -> None:
        zeros = jnp.zeros(COMPONENTS)
        logits = numpyro.sample("logits", dist.Normal(zeros, 1.0).to_event(1))
        centre = numpyro.sample("centre", dist.Normal(zeros, 5.0).to_event(1))
        width = numpyro.sample("width", dist.LogNormal(zeros, 1.0).to_event(1))
        with numpyro.plate("data", len(x)):
            each = dist.Categorical(logits=logits)
            k = numpyro.sample("k", each, infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Normal(centre[k], width[k]), obs=x)

    def guide(x: Any) -> None:
        numpyro.sample("logits", dist.Normal(*q("logits")).to_event(1))
        numpyro.sample("centre", dist.Normal(*q("centre")).to_event(1))
        numpyro.sample("width", dist.LogNormal(*q("width")).to_event(1))

    return model, guide


class Trainer:
    """One case, trained in both ways."""

    def __init__(self, case: Case, path: str) -> None:
        arrays = np.load(path)
        self.case = case
        self.data = tuple(jnp.asarray(arrays[key]) for key in ("data0", "data1") if key in arrays)
        start = {key: jnp.asarray(arrays[key]) for key in arrays if key not in ("data0", "data1")}
        self.model, self.guide, self.elbo = make_programs(case, start)
        self.svi = SVI(self.model, self.guide, numpyro.optim.Adam(case.lr), self.elbo)
        first = self.svi.init(jax.random.key(0), *self.data)
        self.shuffle = np.random.default_rng(0)
        # The state is given away, for XLA to update it in place: so the two must share no memory.
        self.states = {how: jax.tree.map(jnp.copy, first) for how in ("loop", "scan")}
        self.step = jax.jit(self._step, static_argnums=3, donate_argnums=0)
        self.scan = jax.jit(self._scan, donate_argnums=0)

    def _gather(self, index: Any, data: Any) -> Any:
        return tuple(jnp.take(value, index, axis=0, mode="clip") for value in data)

    def _step(self, carry: Any, order: Any, data: Any, rows: int) -> Any:
        """Update on the next `rows` rows of the order; the place in it is carried along."""
        state, place = carry
        if rows < self.case.rows:
            data = self._gather(lax.dynamic_slice_in_dim(order, place, rows), data)
        state, loss = self.svi.update(state, *data)
        return (state, place + rows), loss

    def _scan(self, state: Any, orders: Any, data: Any) -> Any:
        def update(state: Any, index: Any) -> Any:
            batch = data if index is None else self._gather(index, data)
            return self.svi.update(state, *batch)

        return lax.scan(update, state, orders, length=self.case.scan)

    def train_loop(self, steps: int) -> None:
        """Call the jitted update from Python; the last batch of an epoch is what is left."""
        rows, batch = self.case.rows, self.case.batch
        sizes = [min(batch, rows - place) for place in range(0, rows, batch)]
        state, losses = self.states["loop"], []
        while steps > 0:
            order = jnp.asarray(self.shuffle.permutation(rows).astype(np.int32))
            carry = (state, jnp.zeros((), jnp.int32))
            # With all rows in a step there is no order to draw anew.
            for size in sizes[:steps] if len(sizes) > 1 else [rows] * steps:
                carry, loss = self.step(carry, order, self.data, size)
                losses.append(loss)
                steps -= 1
            state = carry[0]
        self.states["loop"] = jax.block_until_ready(state)

    def train_scan(self, steps: int) -> None:
        """Scan over many steps at once; a last, smaller batch cannot be, so it is left out."""
        state = self.states["scan"]
        for _ in range(max(1, round(steps / self.case.scan))):
            state, _ = self.scan(state, self._orders(), self.data)
        self.states["scan"] = jax.block_until_ready(state)

    def _orders(self) -> Any:
        rows, batch = self.case.rows, self.case.batch
        if rows == batch:
            return None
        epochs = -(-self.case.scan // (rows // batch))
        order = np.stack([self.shuffle.permutation(rows) for _ in range(epochs)])
        full = order[:, : rows // batch * batch].reshape(-1, batch)[: self.case.scan]
        return jnp.asarray(full.astype(np.int32))

    def seconds(self, how: str, steps: int) -> float:
        """Take steps, and return the time they took."""
        began = time.perf_counter()
        (self.train_loop if how == "loop" else self.train_scan)(steps)
        return time.perf_counter() - began

    def bound(self, how: str) -> tuple[float, float]:
        """Return the bound of all rows, nats per row, and its standard error."""
        values = self.svi.get_params(self.states[how])

        @jax.jit
        def loss(key: Any) -> Any:
            return self.elbo.loss(key, values, self.model, self.guide, *self.data)

        keys = jax.random.split(jax.random.key(1), EVALUATIONS)
        each = np.array([-float(loss(key)) for key in keys]) / self.case.rows
        return each.mean().item(), each.std(ddof=1).item() / EVALUATIONS**0.5

    def size(self) -> int:
        """Count the parameters."""
        values = self.svi.get_params(self.states["loop"])
        return sum(value.size for value in jax.tree.leaves(values))


def answer(trainers: dict[str, Trainer], name: str, *arguments: Any) -> Any:
    """Do what one line asks for."""
    if name == "versions":
        return f"NumPyro {numpyro.__version__}, jax {jax.__version__}"
    case, *rest = arguments
    if name == "prepare":
        trainers[case] = Trainer(CASES[case], rest[0])
        return trainers[case].size()
    if name == "first":
        return trainers[case].seconds("loop", 2)  # as in step_torch.py
    return getattr(trainers[case], name)(*rest)


def main() -> None:
    """Answer line by line, until stdin ends."""
    trainers: dict[str, Trainer] = {}
    for line in sys.stdin:
        try:
            reply = {"value": answer(trainers, *json.loads(line))}
        except ImportError as error:  # funsor is needed by one case only
            reply = {"missing": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
