"""Models, guides and objectives of many kinds: what a recorded step must get right."""

# pyright: reportArgumentType=false, reportCallIssue=false
# Pyro takes more than its annotations say.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import (
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from guides.flows import zuko
from ppl_models.infer import ELBO

ROWS = 11

Programs = tuple[Any, Any, tuple[Tensor, ...]]  # a model, a guide and data


@dataclass(frozen=True)
class Case:
    """A model, a guide and an objective.

    Attributes:
        name: What is odd about it.
        make: Makes the model, the guide and the data from the global random stream.
        objective: Makes the objective.
        rows: Rows of a minibatch; None if it takes all rows.
    """

    name: str
    make: Callable[[], Programs]
    objective: Callable[[], Any]
    rows: int | None


CASES: list[Case] = []


def case(
    *, objective: Callable[[], Any] = ELBO, rows: int | None = None, name: str = ""
) -> Callable[[Callable[[], Programs]], Callable[[], Programs]]:
    """List what a function makes."""

    def add(make: Callable[[], Programs]) -> Callable[[], Programs]:
        told = name or make.__name__.strip("_").replace("_", " ")
        CASES.append(Case(told, make, objective, rows))
        return make

    return add


def real(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, 2)))


def counts() -> Tensor:
    return torch.poisson(torch.full((ROWS,), 2.0))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.3 * torch.randn(shape))


# Ways to hold parameters.


class Regression(PyroModule):
    """One slope with a prior, a scale with a constraint, a mean that is plain."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = PyroSample(dist.Normal(torch.zeros(2), 1.0).to_event(1))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.shift = parameter()

    def forward(self, x: Tensor, y: Tensor) -> None:
        slope: Any = self.slope
        loc = x @ slope + self.shift
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, self.scale), obs=y)


@case(rows=4)
def a_module_with_a_constraint_and_a_prior() -> Programs:
    model = Regression()
    return model, AutoNormal(model), (real(), real(ROWS))


class LinearGuide(PyroModule):
    """A normal for `z` of each row, with parameters under constraints."""

    def __init__(self, width: int = 2, latent: int = 1) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](width, latent)
        self.scale = PyroParam(torch.full((latent,), 0.4), constraint=constraints.positive)

    def forward(self, x: Tensor, *rest: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), self.scale).to_event(1))


class Decoder(PyroModule):
    """A latent number for each row, and a network that turns it into data."""

    def __init__(self, net: nn.Module | None = None, width: int = 2, latent: int = 1) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(latent, 4), nn.Tanh(), nn.Linear(4, width))
        self.log_scale = parameter(width)
        self.latent = latent

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.log_scale.exp()).to_event(1), obs=x)


@case(rows=4)
def modules_with_constrained_parameters() -> Programs:
    return Decoder(), LinearGuide(), (real(),)


def params_and_modules() -> Programs:
    net, encoder = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", net)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        weight = pyro.param("weight", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(weight * net(z), scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        spread = pyro.param("spread", lambda: torch.full((1,), 0.5), constraints.interval(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), spread).to_event(1))

    return model, guide, (real(),)


for made in (ELBO, Trace_ELBO, TraceMeanField_ELBO):
    case(objective=made, rows=4, name=f"functions with pyro.param, {made.__name__}")(
        params_and_modules
    )


@case()
def a_parameter_shared_by_model_and_guide() -> Programs:
    shared = PyroModule[nn.Linear](2, 2)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.shared(z), 1.0).to_event(1), obs=x)

    class Guide(Model):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x @ self.shared.weight, 0.3).to_event(1))

    return Model(), Guide(), (real(),)


@case(rows=4)
def a_parameter_of_the_store_shared_by_model_and_guide() -> Programs:
    def model(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[:, None].expand(x.shape)
            pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), scale))

    return model, guide, (real(),)


@case(rows=4)
def frozen_parameters() -> Programs:
    model, guide = Decoder(), LinearGuide()
    model.net[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    guide.net.bias.requires_grad_(False)
    return model, guide, (real(),)


@case(rows=4, objective=Trace_ELBO)
def a_parameter_without_a_gradient() -> Programs:
    model = Decoder()
    model.spare = nn.Parameter(torch.ones(3))
    return model, LinearGuide(), (real(),)


@case()
def a_parameter_whose_gradient_is_constant() -> Programs:
    model = Decoder()
    model.gift = nn.Parameter(torch.ones(()))
    inner = model.forward

    def forward(x: Tensor) -> None:
        inner(x)
        pyro.factor("bonus", 2.0 * model.gift)

    model.forward = forward
    return model, LinearGuide(), (real(),)


@case(rows=4)
def a_view_of_a_parameter() -> Programs:
    both = parameter(2, 2)

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.both = both

        def forward(self, x: Tensor) -> None:
            first, second = self.both.unbind()
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z * first, softplus(second)).to_event(1), obs=x)

    return Model(), LinearGuide(), (real(),)


@case()
def no_arguments() -> Programs:
    observed = real(ROWS)

    def model() -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(observed)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=observed)

    return model, AutoNormal(model), ()


@case(rows=4)
def two_arguments() -> Programs:
    net = nn.Linear(3, 1)

    def model(x: Tensor, y: Tensor) -> None:
        slope = pyro.param("slope", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ slope + z, 0.5), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(torch.cat((x, y[:, None]), -1)).squeeze(-1), 0.5))

    return model, guide, (real(), real(ROWS))


@case(rows=4)
def a_tensor_in_a_closure_and_a_number_out_of_a_tensor() -> Programs:
    weight = torch.tensor(0.7)
    net = nn.Linear(2, 1)

    def model(x: Tensor) -> None:
        spread = x.detach().std().item()
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * torch.ones(2), spread).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(net(x), 0.4).to_event(1))

    return model, guide, (real(),)


# Guides of Pyro, and flows.


def hierarchy(x: Tensor, y: Tensor) -> None:
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        shift = pyro.sample("shift", dist.Normal(0.0, spread))
        pyro.sample("y", dist.Normal(x @ slope + shift, 0.5), obs=y)


def _automatic(guide: Callable[[Any], Any]) -> Programs:
    return hierarchy, guide(hierarchy), (real(), real(ROWS))


def _list(model: Any) -> AutoGuideList:
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["shift", "spread"])))
    guide.append(AutoDelta(poutine.block(model, expose=["slope"])))
    return guide


for made in (
    AutoNormal,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoLowRankMultivariateNormal,
    AutoIAFNormal,
    AutoDelta,
    AutoStructured,
    _list,
):
    case(name="AutoGuideList" if made is _list else made.__name__)(partial(_automatic, made))
case(name="AutoNormal, TraceMeanField_ELBO", objective=TraceMeanField_ELBO)(
    partial(_automatic, AutoNormal)
)


@case(rows=4)
def a_flow_of_zuko_called_by_hand() -> Programs:
    flow = zuko.flows.NSF(2, context=2, transforms=1, bins=3, hidden_features=(4,))

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(flow(x)))

    return Decoder(latent=2), guide, (real(),)


# Networks.


@case(rows=4)
def batch_norm_and_dropout() -> Programs:
    net = nn.Sequential(
        nn.Linear(1, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.4), nn.Linear(5, 2)
    )
    return Decoder(net), LinearGuide(), (real(),)


@case(rows=4, objective=partial(Trace_ELBO, num_particles=2))
def batch_norm_in_two_runs_of_a_step() -> Programs:
    net = nn.Sequential(nn.Linear(1, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    return Decoder(net), LinearGuide(), (real(),)


@case(rows=4)
def a_recurrent_encoder() -> Programs:
    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.GRU(1, 3, batch_first=True)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> None:
            _, state = self.recurrent(x[..., None])
            loc, scale = self.head(state[0]).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, softplus(scale)).to_event(1))

    return Decoder(width=5), Guide(), (real(ROWS, 5),)


# Plates and time.


@case()
def a_plate_that_subsamples_by_itself() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[rows])

    return model, AutoNormal(model), (real(),)


@case(objective=Trace_ELBO)
def a_plate_that_subsamples_its_argument() -> Programs:
    spread = nn.Linear(2, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=4):
            part = pyro.subsample(x, event_dim=1)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=part)

    def guide(x: Tensor) -> None:
        pyro.module("spread", spread)
        with pyro.plate("data", len(x), subsample_size=4):
            part = pyro.subsample(x, event_dim=1)
            pyro.sample("z", dist.Normal(part, softplus(spread(part))).to_event(1))

    return model, guide, (real(),)


@case(rows=4)
def nested_plates() -> Programs:
    def model(x: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(top, 1.0))
            with pyro.plate("inner", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.1))
        gain = pyro.param("gain", torch.tensor(0.6))
        pyro.sample("top", dist.Normal(loc, 0.3))
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.Normal(gain * x.mean(-1, keepdim=True), 0.5))

    return model, guide, (real(ROWS, 3),)


@case(rows=4)
def a_sequential_plate() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for row in pyro.plate("data", len(x)):
            pyro.sample(f"x_{row}", dist.Normal(loc, 0.5).to_event(1), obs=x[row])

    return model, AutoNormal(model), (real(),)


def walk(x: Tensor) -> None:
    step = pyro.param("step", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z: Any = 0.0
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Normal(z, step))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5), obs=x[:, t])


@case(rows=4)
def a_time_series() -> Programs:
    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.full((x.shape[1],), 0.5))
        scale = pyro.param("scale", torch.full((x.shape[1],), 0.3), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            before: Any = 0.0
            for t in range(x.shape[1]):
                loc = gain[t] * x[:, t] + 0.1 * before
                before = pyro.sample(f"z_{t}", dist.Normal(loc, scale[t]))

    return walk, guide, (real(ROWS, 5),)


@case()
def a_series_without_a_plate() -> Programs:
    def model(x: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        for t in range(len(x)):
            level = pyro.sample(f"level_{t}", dist.Normal(0.9 * level, 0.3))
            pyro.sample(f"x_{t}", dist.StudentT(4.0, level, 0.5), obs=x[t])

    return model, AutoNormal(model), (real(6),)


# Discrete latents.


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), 2.0)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[k], scale), obs=x)


def mixture_guide(x: Tensor, enumerate: str | None = None) -> None:
    concentration = pyro.param("concentration", torch.ones(3), constraint=constraints.positive)
    pyro.sample("weights", dist.Dirichlet(concentration))
    loc = pyro.param("loc_loc", torch.tensor([-1.0, 0.1, 1.0]))
    with pyro.plate("components", 3):
        pyro.sample("loc", dist.Normal(loc, 0.2))
    if enumerate is not None:
        with pyro.plate("data", len(x)):
            logits = -((x[:, None] - loc) ** 2)
            pyro.sample(
                "k",
                dist.Categorical(logits=logits),
                infer={"enumerate": enumerate},
            )


case(
    name="a mixture, enumerated in the model",
    objective=partial(TraceEnum_ELBO, max_plate_nesting=1),
    rows=4,
)(lambda: (mixture, mixture_guide, (real(ROWS),)))
for how in ("parallel", "sequential"):
    case(
        name=f"a mixture with a guide for what is enumerated, {how}",
        objective=partial(TraceEnum_ELBO, max_plate_nesting=1),
        rows=4 if how != "sequential" else None,
    )(
        lambda how=how: (
            poutine.infer_config(mixture, config_fn=lambda site: {"enumerate": None}),
            partial(mixture_guide, enumerate=how),
            (real(5) if how == "sequential" else real(ROWS),),
        )
    )


@case(objective=partial(TraceEnum_ELBO, max_plate_nesting=1), rows=4)
def a_mixture_with_AutoNormal_of_its_continuous_sites() -> Programs:
    guide = AutoNormal(poutine.block(mixture, hide=["k"]))
    return mixture, guide, (real(ROWS),)


@case(objective=partial(TraceEnum_ELBO, max_plate_nesting=1), rows=4)
def a_hidden_markov_model() -> Programs:
    @config_enumerate
    def model(x: Tensor) -> None:
        simplex = constraints.simplex
        first = pyro.param("first", torch.tensor([0.3, 0.7]), constraint=simplex)
        move = pyro.param("move", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            k: Any = None
            for t in pyro.markov(range(x.shape[1])):
                k = pyro.sample(f"k_{t}", dist.Categorical(first if k is None else move[k]))
                pyro.sample(f"x_{t}", dist.Normal(loc[k], 0.5), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pass

    return model, guide, (real(ROWS, 4),)


def switch(x: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor([-0.5, 0.8]))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc[k.long()] + z, 0.5), obs=x)


def switch_guide(x: Tensor, baseline: dict[str, Any] | None = None) -> None:
    gain = pyro.param("gain", torch.tensor(0.4))
    with pyro.plate("data", len(x)):
        options = {"baseline": baseline} if baseline else {}
        k = pyro.sample("k", dist.Bernoulli(logits=gain * x), infer=options)
        pyro.sample("z", dist.Normal(gain * (x - k), 0.5))


for told, objective in {
    "ELBO": ELBO,
    "ELBO of particles at once": partial(ELBO, particles=3),
    "ELBO of particles one by one": partial(ELBO, particles=2, vectorized=False),
    "Trace_ELBO": Trace_ELBO,
    "TraceGraph_ELBO": TraceGraph_ELBO,
}.items():
    case(name=f"a discrete latent by score function, {told}", objective=objective, rows=4)(
        lambda: (switch, switch_guide, (real(ROWS),))
    )


@case(objective=Trace_ELBO, rows=4)
def a_categorical_latent_by_score_function_and_a_normal_that_depends_on_it() -> Programs:
    logits = nn.Linear(1, 3)
    table = parameter(3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.full((3,), 1 / 3)))
            z = pyro.sample("z", dist.Normal(torch.arange(3.0)[k], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("logits", logits)
        shift = pyro.param("shift", table)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=logits(x[:, None])))
            pyro.sample("z", dist.Normal(x + shift[k], 0.5))

    return model, guide, (real(ROWS),)


@case(objective=TraceGraph_ELBO, rows=4)
def a_baseline_that_is_a_network() -> Programs:
    net = nn.Linear(1, 1)

    def guide(x: Tensor) -> None:
        pyro.module("baseline", net)
        baseline = {
            "nn_baseline": lambda value: net(value).squeeze(-1),
            "nn_baseline_input": x[:, None],
        }
        switch_guide(x, baseline)

    return switch, guide, (real(ROWS),)


@case(objective=TraceGraph_ELBO)
def a_baseline_that_is_a_decaying_average() -> Programs:
    guide = partial(switch_guide, baseline={"use_decaying_avg_baseline": True})
    return switch, guide, (real(ROWS),)


@case(objective=TraceGraph_ELBO)
def a_decaying_average_that_an_earlier_fit_left() -> Programs:
    guide = partial(switch_guide, baseline={"use_decaying_avg_baseline": True})
    pyro.param("__baseline_avg_downstream_cost_k", real(ROWS))
    return switch, guide, (real(ROWS),)


@case(rows=4)
def a_relaxed_choice() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 0.0, 1.0]))
        temperature = torch.tensor(0.5)
        with pyro.plate("data", len(x)):
            k = pyro.sample(
                "k", dist.RelaxedOneHotCategorical(temperature, torch.full((3,), 1 / 3))
            )
            pyro.sample("x", dist.Normal(k @ loc, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor([-0.3, 0.1, 0.4]))
        with pyro.plate("data", len(x)):
            logits = gain * x[:, None]
            pyro.sample("k", dist.RelaxedOneHotCategorical(torch.tensor(0.5), logits=logits))

    return model, guide, (real(ROWS),)


@case(rows=4)
def a_straight_through_choice() -> Programs:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            pyro.sample(
                "k",
                dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=gain * x),
            )

    return model, guide, (real(ROWS),)


# Objectives.


for told, objective in {
    "Trace_ELBO of particles one by one": partial(Trace_ELBO, num_particles=3),
    "Trace_ELBO of particles at once": partial(
        Trace_ELBO, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "TraceMeanField_ELBO of particles": partial(TraceMeanField_ELBO, num_particles=2),
    "TraceGraph_ELBO": TraceGraph_ELBO,
    "ELBO with analytic KL": partial(ELBO, analytic_kl=True),
    "ELBO with analytic KL, of particles at once": partial(ELBO, particles=3, analytic_kl=True),
    "ELBO with analytic KL, of particles one by one": partial(
        ELBO, particles=3, analytic_kl=True, vectorized=False
    ),
}.items():
    case(name=told, objective=objective, rows=4)(lambda: (Decoder(), LinearGuide(), (real(),)))

for told, objective in {
    "RenyiELBO of particles one by one": partial(RenyiELBO, alpha=0.5, num_particles=2),
    "RenyiELBO of particles at once": partial(
        RenyiELBO, alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
    "ReweightedWakeSleep": partial(ReweightedWakeSleep, num_particles=2, max_plate_nesting=1),
    "ReweightedWakeSleep of particles at once": partial(
        ReweightedWakeSleep, num_particles=3, vectorize_particles=True, max_plate_nesting=1
    ),
}.items():
    case(name=told, objective=objective)(lambda: (Decoder(), LinearGuide(), (real(),)))


@case(
    objective=partial(
        ReweightedWakeSleep,
        num_particles=2,
        num_sleep_particles=2,
        insomnia=0.5,
        max_plate_nesting=1,
        vectorize_particles=False,
    )
)
def wake_and_sleep() -> Programs:
    class Model(Decoder):
        def forward(self, x: Tensor, observations: Any = None) -> None:
            super().forward(x)

    class Guide(LinearGuide):
        def forward(self, x: Tensor, *rest: Tensor, observations: Any = None) -> None:
            super().forward(x if observations is None else observations["x"])

    return Model(), Guide(), (real(),)


@case(objective=partial(TraceTMC_ELBO, max_plate_nesting=1))
def tensor_monte_carlo() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    @partial(config_enumerate, default="parallel", expand=False, num_samples=3)
    def guide(x: Tensor) -> None:
        centre = pyro.param("centre", torch.tensor(0.2))
        gain = pyro.param("gain", torch.tensor(0.5))
        pyro.sample("loc", dist.Normal(centre, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, 0.5))

    return model, guide, (real(ROWS),)


@case(objective=partial(Trace_ELBO, num_particles=2))
def the_same_draw_in_two_particles() -> Programs:
    concentration = torch.full((3,), 2.0)

    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(concentration))
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(weights @ loc + torch.randn_like(x), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("weights", dist.Dirichlet(concentration))

    return model, guide, (real(ROWS),)


# Handlers.


@case(rows=4)
def masks_scales_and_factors() -> Programs:
    weight = parameter()

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=0.3):
                    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                with poutine.mask(mask=x[:, 0] > 0):
                    pyro.sample("x", dist.Normal(z * self.weight, 1.0).to_event(1), obs=x[:, :1])
                pyro.factor("smooth", -(z**2).sum(-1) * self.weight**2)
            pyro.deterministic("twice", 2 * self.weight)

    return Model(), LinearGuide(), (real(),)


@case(rows=4)
def missing_values_behind_a_mask() -> Programs:
    def model(x: Tensor, present: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            seen = dist.Normal(loc + z[:, None], 1.0).mask(present.bool()).to_event(1)
            pyro.sample("x", seen, obs=x)

    def guide(x: Tensor, present: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * (x * present).sum(-1), 0.5))

    return model, guide, (real(), torch.bernoulli(torch.full((ROWS, 2), 0.6)))


@case(rows=4)
def an_improper_prior() -> Programs:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0).mask(False))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    return model, AutoNormal(model), (real(ROWS),)


@case()
def a_reparametrised_site() -> Programs:
    model = poutine.reparam(hierarchy, config={"shift": LocScaleReparam(0.0)})
    return model, AutoNormal(model), (real(), real(ROWS))


# Distributions.


def _latents(prior: Callable[[], Any], posterior: Callable[[Tensor], Any]) -> Programs:
    """A positive number for each row, and counts that have it as their mean."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            z = z if z.ndim == 1 else z[:, 0]
            pyro.sample("x", dist.Poisson(3 * z + 0.1), obs=x)

    def guide(x: Tensor) -> None:
        one = pyro.param("one", torch.tensor(1.5), constraint=constraints.positive)
        other = pyro.param("other", torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(torch.stack((one + x, other + 0.1 * x), -1)))

    return model, guide, (counts(),)


for told, prior, posterior in (
    ("gamma", lambda: dist.Gamma(1.5, 1.0), lambda v: dist.Gamma(v[:, 0], v[:, 1])),
    ("beta", lambda: dist.Beta(1.5, 1.0), lambda v: dist.Beta(v[:, 0], v[:, 1])),
    ("Dirichlet", lambda: dist.Dirichlet(torch.ones(2)), lambda v: dist.Dirichlet(v)),
    ("log-normal", lambda: dist.LogNormal(0.0, 1.0), lambda v: dist.LogNormal(0.0, v[:, 1])),
    ("Weibull", lambda: dist.Weibull(1.0, 1.5), lambda v: dist.Weibull(v[:, 0], v[:, 1])),
    ("inverse gamma", lambda: dist.InverseGamma(2.0, 1.0), lambda v: dist.InverseGamma(*v.T)),
    (
        "half-Cauchy",
        lambda: dist.HalfCauchy(1.0),
        lambda v: dist.TransformedDistribution(
            dist.Normal(0.0, v[:, 1]), [dist.transforms.SoftplusTransform()]
        ),
    ),
):
    case(name=f"a {told} latent", rows=4)(partial(_latents, prior, posterior))


def _observed(likelihood: Callable[[Tensor, Tensor], Any], data: Callable[[], Tensor]) -> Programs:
    def model(x: Tensor) -> None:
        other = pyro.param("other", torch.tensor(0.4))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", likelihood(z, other), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(gain * x, 0.5))

    return model, guide, (data(),)


def _ordered(z: Tensor, other: Tensor) -> Any:
    cuts = torch.stack((-other.abs(), other.abs() + 0.5))
    return dist.OrderedLogistic(z, cuts)


for told, likelihood, data in (
    ("Poisson", lambda z, other: dist.Poisson((z + other).exp()), counts),
    (
        "categorical",
        lambda z, other: dist.Categorical(logits=torch.stack((z, z * other, -z), -1)),
        lambda: torch.randint(3, (ROWS,)).to(torch.get_default_dtype()),
    ),
    (
        "negative binomial",
        lambda z, other: dist.NegativeBinomial(softplus(other), logits=z),
        counts,
    ),
    (
        "zero-inflated Poisson",
        lambda z, other: dist.ZeroInflatedPoisson(z.exp(), gate=torch.sigmoid(other)),
        counts,
    ),
    (
        "zero-inflated negative binomial",
        lambda z, other: dist.ZeroInflatedNegativeBinomial(
            softplus(other), logits=z, gate_logits=other
        ),
        counts,
    ),
    ("binomial", lambda z, other: dist.Binomial(20, logits=z + other), counts),
    (
        "beta-binomial",
        lambda z, other: dist.BetaBinomial(z.exp(), softplus(other), total_count=20),
        counts,
    ),
    (
        "gamma-Poisson",
        lambda z, other: dist.GammaPoisson(z.exp(), softplus(other)),
        counts,
    ),
    (
        "ordered logistic",
        _ordered,
        lambda: torch.randint(3, (ROWS,)).to(torch.get_default_dtype()),
    ),
    ("Laplace", lambda z, other: dist.Laplace(z, softplus(other)), lambda: real(ROWS)),
    ("von Mises", lambda z, other: dist.VonMises(z, softplus(other)), lambda: real(ROWS)),
    (
        "mixture of normals",
        lambda z, other: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Normal(torch.stack((z, z + other), -1), 0.5),
        ),
        lambda: real(ROWS),
    ),
):
    case(name=f"{told} observations", rows=4)(partial(_observed, likelihood, data))


@case(rows=4)
def correlations_and_a_multivariate_normal() -> Programs:
    def model(x: Tensor) -> None:
        corr = pyro.sample("corr", dist.LKJCholesky(3, 2.0))
        with pyro.plate("columns", 3):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            factor = scale[:, None] * corr
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=factor), obs=x)

    return model, AutoNormal(model), (real(ROWS, 3),)


@case()
def a_gaussian_process() -> Programs:
    def model(x: Tensor, y: Tensor) -> None:
        length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
        noise = pyro.param("noise", torch.tensor(0.3), constraint=constraints.positive)
        kernel = (-0.5 * ((x[:, None] - x) / length) ** 2).exp() + noise * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)

    return model, AutoNormal(model), (real(ROWS), real(ROWS))
