# %% [markdown]
# # 5. The two gradients of a lecture
#
# To train a guide you need the gradient of an expectation with respect to the parameters of the
# distribution that it is taken over. There are two ways to get it from draws: by *score function*, and
# *along the path*, also called reparametrisation. Both are right on average. They differ in noise, and
# in what they ask for. By the end you will have
#
# - derived both, and checked their variances against a formula,
# - trained one model with each of them, and measured the noise of its gradients,
# - seen an estimator whose noise is zero at the posterior, and one whose signal drowns when you take
#   more particles,
# - met a latent that has no path, and eight estimators for it, with the exact variance beside the
#   measured one,
# - seen what a smooth stand-in for a binary draw costs: a bias, measured against the exact gradient.

# %%
import math
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from guides import Amortized, families
from ppl_models import PPCA, VAE, SigmoidBeliefNetwork
from ppl_models.data import load
from ppl_models.evaluate import elbo, gradient_variance
from ppl_models.infer import ELBO, IWAE, fit
from ppl_models.infer.gradients import (
    ARM,
    REBAR,
    RELAX,
    DisARM,
    DReG,
    Enumerate,
    LeaveOneOut,
    Reinforce,
    RunningAverage,
    StickingTheLanding,
)

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## Two derivations
#
# We want the gradient of $\mathbb{E}_{q_\phi(z)}[f(z)]$ by $\phi$. It cannot be moved inside as it
# stands, because $\phi$ is in the distribution.
#
# **By score.** Write the expectation as an integral, and use $\nabla q = q \, \nabla \log q$:
#
# $$\nabla_\phi \int q_\phi(z) f(z) \, dz = \int f(z) \, \nabla_\phi q_\phi(z) \, dz
#   = \mathbb{E}_{q_\phi}\left[f(z) \, \nabla_\phi \log q_\phi(z)\right].$$
#
# $\nabla_\phi \log q_\phi$ is called the *score*. $f$ is only evaluated, never differentiated. It may have
# jumps, $z$ may be discrete, and $f$ may even be a game that is won or lost.
#
# **Along the path.** Write the draw as a function of noise, $z = g_\phi(\varepsilon)$, where the
# distribution of $\varepsilon$ has no parameters. Now the gradient goes inside by itself:
#
# $$\nabla_\phi \mathbb{E}_{\varepsilon}\left[f(g_\phi(\varepsilon))\right]
#   = \mathbb{E}_{\varepsilon}\left[f'(g_\phi(\varepsilon)) \, \nabla_\phi g_\phi(\varepsilon)\right].$$
#
# This needs a smooth $f$ and a smooth $g$. In return it knows the slope of $f$ at the draw, and the
# score function knows its height only.
#
# ## Where all is known
#
# Take $f(x) = x^2$ and $x \sim \mathcal{N}(\mu, 1)$. The expectation is $\mu^2 + 1$ and its gradient
# $2 \mu$. With $x = \mu + \varepsilon$ the two estimates from one draw are
#
# $$\text{score: } x^2 (x - \mu) = (\mu + \varepsilon)^2 \, \varepsilon, \qquad
#   \text{path: } 2 x = 2 (\mu + \varepsilon).$$
#
# Their variances follow from $\mathbb{E}\,\varepsilon^2 = 1$, $\mathbb{E}\,\varepsilon^4 = 3$,
# $\mathbb{E}\,\varepsilon^6 = 15$. Along the path it is 4. By score,
#
# $$\mathbb{E}\left[(\mu + \varepsilon)^4 \varepsilon^2\right] - (2 \mu)^2
#   = \mu^4 + 18 \mu^2 + 15 - 4 \mu^2 = \mu^4 + 14 \mu^2 + 15.$$
#
# To measure them, we say it in Pyro. `pyro.factor` adds $x^2$ to the log density of the model, and
# `kl_weight=0.0` leaves only that. `everywhere=True` has the score function taken where a path exists,
# for comparison. Each of 13 values of $\mu$ is there in many copies, each with a parameter of its own.

# %%
copies, grid = 20 if SMOKE else 1000, torch.linspace(-3.0, 3.0, 13)
few = 10 if SMOKE else 200


def square():
    with pyro.plate("data", copies * len(grid)):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x.square())


def normal():
    mu = pyro.param("mu", grid.repeat(copies))
    with pyro.plate("data", copies * len(grid)):
        pyro.sample("x", dist.Normal(mu, 1.0))


by_score = Reinforce(everywhere=True)
squares = gradient_variance(
    square,
    normal,
    objectives={"score": ELBO(score=by_score, kl_weight=0.0), "path": ELBO(kl_weight=0.0)},
    draws=10 if SMOKE else 400,
)
measured = {
    name: squares.variance[name]["guide.mu"].view(copies, -1).mean(0) for name in squares.variance
}
formula = {"score": grid**4 + 14 * grid**2 + 15, "path": torch.full_like(grid, 4.0)}

fig, ax = plt.subplots(figsize=(7, 3.6))
for name, color in (("score", "C0"), ("path", "C1")):
    ax.plot(grid, formula[name], color=color, label=f"{name}, by the formula")
    ax.plot(grid, measured[name], "o", color=color, label=f"{name}, measured")
ax.set(
    yscale="log", xlabel=r"$\mu$", ylabel="variance of one estimate", title="Two gradients of E[x²]"
)
ax.legend(frameon=False)
plt.show()

# %%
apart = {name: (measured[name] / formula[name] - 1).abs().max().item() for name in measured}
for name, value in apart.items():
    print(f"{name}: measured and formula differ by {value:.1%} at most")
assert SMOKE or max(apart.values()) < 0.05

# %% [markdown]
# The path is better by a factor of almost four where it is worst, and its noise does not depend on $\mu$. The
# noise of the score function grows with the *height* of the cost: add 100 to $f$, and nothing changes
# in the gradient or along the path, but the score is multiplied by numbers around 100. Remember this.
# Everything that makes the score function usable takes a height off.
#
# ## The same for the bound
#
# The cost of a guide is $f(z) = \log p(x, z) - \log q_\phi(z)$, and it depends on $\phi$ itself. So there
# is one more term, $-\nabla_\phi \log q_\phi(z)$ at a fixed $z$. Its mean is zero, since $\int q_\phi$ is
# 1 whatever $\phi$ is:
#
# $$\text{score: } \left(\log p(x, z) - \log q_\phi(z)\right) \nabla_\phi \log q_\phi(z), \qquad
#   \text{path: } \nabla_z \left(\log p(x, z) - \log q_\phi(z)\right) \nabla_\phi g_\phi(\varepsilon)
#   - \nabla_\phi \log q_\phi(z).$$
#
# `ELBO()` goes along the path wherever there is one. One VAE on digits, from one start, with one seed,
# and four gradients. Two of the four take something off the height: the mean of earlier costs, and
# the mean of the other three of four particles.

# %%
digits = load("digits", binarize="threshold")
objectives = {
    "path": ELBO(),
    "score": ELBO(score=by_score),
    "score, less a running average": ELBO(score=RunningAverage(everywhere=True)),
    "score, less the other 3 of 4": ELBO(4, score=LeaveOneOut(everywhere=True)),
}
epochs = 2 if SMOKE else 100
trained, curves, table = {}, {}, {}
for name, objective in objectives.items():
    torch.manual_seed(0)
    vae = VAE(data_dim=64, latent_dim=8, hidden=(64,))
    guide = Amortized(vae, hidden=(64,))
    result = fit(
        vae,
        guide,
        digits.x,
        objective=objective,
        epochs=epochs,
        batch_size=64,
        lr=3e-3,
        seed=0,
        progress=False,
    )
    curves[name] = result.bounds.view(epochs, -1).mean(1)
    bound = elbo(vae, guide, digits.x_test, particles=20 if SMOKE else 500, seed=0)
    table[name] = {"ELBO of test rows": bound.mean, "standard error": bound.se}
    trained[name] = vae, guide

fig, ax = plt.subplots(figsize=(7, 3.6))
for name, curve in curves.items():
    ax.plot(range(1, epochs + 1), curve, label=name)
ax.set(
    xlabel="epoch", ylabel="ELBO, nats per row", ylim=(-32, None), title="One VAE, four gradients"
)
ax.legend(frameon=False)
plt.show()

# %%
pd.DataFrame(table).T.round(3)

# %% [markdown]
# All four climb the same bound, and all four estimates have the same mean. The plain score function is
# behind by nats, and what it is behind by is noise. Taking a height off rescues most of it. (The one
# with four particles also averages over four draws, so its decoder learns from less noise too. It is
# not a comparison at equal cost.)
#
# ### How much noise?
#
# `gradient_variance` holds the parameters still, and estimates the gradient over and over. Here at the
# pair that was trained along the path. *Signal/noise* is the length of the mean gradient over the
# root of the variance, both of all parameters together.

# %%
pair = trained["path"]
noise = gradient_variance(
    *pair,
    digits.x[:64],
    objectives=objectives
    | {"path, 4 particles": ELBO(4), "sticking the landing": ELBO(path=StickingTheLanding())},
    draws=10 if SMOKE else 500,
)
print(noise)

# %%
noise.plot()

# %% [markdown]
# The estimators are for the guide. The model's gradient has no such problem: $\log p(x, z)$ is
# differentiated at the draw, and its variance is the same for all that take one particle.
#
# Compare those with four particles. What is left between them is what the slope of the cost knows and
# four heights do not.
#
# ## No noise at the goal
#
# The last line of the table drops the term with mean zero, and follows the path alone (Roeder, Wu &
# Duvenaud, 2017, https://arxiv.org/abs/1703.09194). Why should one do that? Suppose that the guide *is*
# the posterior. Then $\log p(x, z) - \log q(z)$ is $\log p(x)$ for every $z$, a constant, and its slope
# by $z$ is zero. Not zero on average: zero. The dropped term alone would be noise.
#
# In PPCA the posterior is known. A guide with free parameters starts right there, or a little off:

# %%
torch.manual_seed(0)
ppca = PPCA(data_dim=5, latent_dim=2).double()  # in double precision, to see how small a zero is
x = ppca(size=50).detach()
exact = ppca.posterior(x)


def near(shift, scale):
    """A guide at the posterior, moved and widened."""

    def guide(x):
        loc = pyro.param("loc", (exact.mean + shift).detach())
        factor = (scale * exact.scale_tril).detach().contiguous()
        factor = pyro.param("scale_tril", factor, constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=factor))

    pyro.clear_param_store()
    return guide


both = {"ELBO": ELBO(), "sticking the landing": ELBO(path=StickingTheLanding())}
landing = pd.DataFrame(columns=list(both), dtype=float)
for shift in (1.0, 0.3, 0.1, 0.01, 0.0):
    found = gradient_variance(ppca, near(shift, 1.0), x, objectives=both, draws=few)
    landing.loc[f"posterior means moved by {shift}"] = [found.total(name, "guide") for name in both]
landing.map(lambda value: f"{value:.1e}")

# %% [markdown]
# The closer the guide, the less noise, down to rounding. The plain gradient keeps its noise to the end.
# Where the guide's family does not contain the posterior, as in a VAE, the noise does not go to zero.
# Still, in the table above one draw with it has less noise than four draws without. (Far from the
# posterior it can be the other way round.)
#
# ## A signal that drowns
#
# The importance-weighted bound of $K$ particles gets tighter with $K$,
#
# $$\mathcal{L}_K = \mathbb{E}\left[\log \frac{1}{K} \sum_{k=1}^K w_k\right], \qquad
#   w_k = \frac{p(x, z_k)}{q_\phi(z_k)}.$$
#
# In the limit it is $\log p(x)$, and that does not depend on $\phi$ at all. So the guide's gradient goes
# to zero, as $1 / K$. Its noise goes to zero as well, but only as $1 / \sqrt{K}$ (Rainforth et al.,
# 2018, https://arxiv.org/abs/1802.04537). More particles, a better bound, and a guide that learns
# *less*. The gradient has a part like that of the last section, with mean zero. DReG (Tucker et
# al., 2019, https://arxiv.org/abs/1810.04152) turns it into a path once more, so that its noise falls
# faster than its signal.
#
# On PPCA again, with a guide 1.2 times as wide as the posterior:

# %%
sizes = (1, 4, 16, 64)
kinds = {"IWAE": None, "DReG": DReG()}
draws = 20 if SMOKE else 1000


def signals(scale):
    """Signal to noise of both halves, by estimator: a table with a line for each K."""
    guide = near(0.1, scale)
    weighted = {(kind, k): IWAE(k, path=path) for kind, path in kinds.items() for k in sizes}
    found = gradient_variance(
        ppca,
        guide,
        x,
        objectives={f"{kind} {k}": o for (kind, k), o in weighted.items()},
        draws=draws,
    )
    return {
        (kind, half): [found.signal_to_noise(f"{kind} {k}", half) for k in sizes]
        for kind in kinds
        for half in ("guide", "model")
    }


wide = signals(1.2)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
for ax, half in zip(axes, ("guide", "model"), strict=True):
    for kind, marker in (("IWAE", "o"), ("DReG", "x")):
        ax.plot(sizes, wide[kind, half], marker=marker, label=kind)
    for power, style in ((0.5, ":"), (-0.5, "--")):
        start = wide["IWAE" if power < 0 or half == "model" else "DReG", half][0]
        if half == "guide" or power > 0:
            line = [start * k**power for k in sizes]
            ax.plot(sizes, line, color="gray", linestyle=style, label=f"$K^{{{power}}}$")
    ax.set(xscale="log", yscale="log", xlabel="particles K", title=f"gradient of the {half}")
    ax.set_xticks(sizes, [str(k) for k in sizes])
    ax.minorticks_off()
    ax.legend(frameon=False)
axes[0].set_ylabel("signal to noise of one estimate")
plt.show()

# %% [markdown]
# The model's gradient gains from particles either way. DReG changes the guide's.
#
# There is a condition. It is about the tails: if $q$ is narrower than $1/\sqrt{2} = 0.71$ of a normal
# posterior, the variance of $w$ is infinite, and a mean of $K$ of them does not settle as
# $1/\sqrt{K}$. The slopes of these curves, and of those for a guide 0.6 times as wide:


# %%
def power(values):
    """The slope of a straight line through a curve on log scales."""
    return np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-9)), 1)[0]


narrow = signals(0.6)
slopes = pd.DataFrame(
    {
        f"{kind}, {half}": [power(by[kind, half]) for by in (wide, narrow)]
        for kind in kinds
        for half in ("guide", "model")
    },
    index=["guide 1.2 times as wide", "guide 0.6 times as wide"],
)
slopes.round(2)

# %% [markdown]
# So DReG is no remedy for a guide that is too narrow, and guides trained by the ELBO tend to be.
#
# ## Where there is no path
#
# A Bernoulli draw is 0 or 1. Let its probability move a little, and the draw stays where it is, or
# jumps. There is no slope to follow. In torch and Pyro a distribution says whether it has a path:

# %%
print("Normal:   ", dist.Normal(0.0, 1.0).has_rsample)
print("Bernoulli:", dist.Bernoulli(0.3).has_rsample)
try:
    dist.Bernoulli(0.3).rsample()
except NotImplementedError as error:
    print(f"asked for a draw with a gradient: {type(error).__name__}({error})")

# %% [markdown]
# `ELBO()` looks at each site, and takes the score function where it has to. An estimator that does not
# fit is refused before the first step:


# %%
def message_of(action):
    """Run what is expected to fail, and print what it says."""
    try:
        action()
    except ValueError as error:
        print(f"{type(error).__name__}: {error}\n")


torch.manual_seed(1)
sbn = SigmoidBeliefNetwork(data_dim=6, latent_dims=(4,))
plain = Amortized(sbn, hidden=())
rows = sbn(size=20).detach()
message_of(lambda: fit(sbn, plain, rows, objective=ELBO(path=StickingTheLanding()), progress=False))
message_of(lambda: fit(*pair, digits.x, objective=ELBO(score=DisARM()), progress=False))

# %% [markdown]
# ## Eight estimators for a coin
#
# The smallest example there is: $b \sim \mathrm{Bernoulli}(\theta)$, the cost is $(b - t)^2$, and we want
# the gradient by the logit of $\theta$. With $D = f(1) - f(0) = 1 - 2 t$ it is $\theta (1 - \theta) D$.
# For $t$ near one half the cost is about a quarter whatever is drawn, and the little that differs is
# the signal.
#
# - **REINFORCE**: the cost times the score, $f(b) (b - \theta)$.
# - **Running average**: the same, and the mean cost of earlier steps is taken off.
# - **LeaveOneOut** (Kool, van Hoof & Welling, 2019): two draws, and each has the other's cost taken
#   off. Where they are equal nothing is left.
# - **ARM** (Yin & Zhou, 2019): a draw is $u < \theta$ for a uniform $u$. Its partner has $1 - u$, an
#   *antithetic* draw. The estimate is $(f(\tilde b) - f(b)) (u - \frac12)$.
# - **DisARM** (Dong, Mnih & Tucker, 2020): ARM's mean over all $u$ that give this pair of draws.
# - **REBAR** (Tucker et al., 2017): what is taken off is the cost at a smooth version of the draw. It
#   is given back along the path, since smooth draws have one. A factor, which is trained, says how
#   much of it.
# - **RELAX** (Grathwohl et al., 2018): and a network is added to it, which is trained too.
# - **Enumerate**: no draws. Both states, each with its probability. The exact gradient.
#
# For five of them the variance is a line of algebra.


# %%
def known(theta, t):
    """Variance of a single estimate, by estimator."""
    jump, p = 1 - 2 * t, min(theta, 1 - theta)
    true = theta * (1 - theta) * jump
    cost = {0: t**2, 1: (1 - t) ** 2}

    def by_score(baseline):
        ones = theta * ((cost[1] - baseline) * (1 - theta)) ** 2
        return ones + (1 - theta) * ((cost[0] - baseline) * theta) ** 2 - true**2

    found = {
        "REINFORCE": by_score(0.0),
        "running average": by_score(theta * cost[1] + (1 - theta) * cost[0]),
        "LeaveOneOut(2)": theta * (1 - theta) * jump**2 / 2 - true**2,
        "ARM": 2 * jump**2 * (0.125 - (0.5 - p) ** 3) / 3 - true**2,
        "DisARM": p * (1 - p) ** 2 * jump**2 / 2 - true**2,
        "Enumerate": 0.0,
    }
    return {name: round(value, 12) for name, value in found.items()}  # rounding errors are zeros


# %% [markdown]
# REBAR and RELAX train what they take off, so `fit` does that along with the guide. `gradient_variance`
# holds everything still, so here we do it by hand. The surrogate of a prepared objective holds the loss
# of what the estimator trains.

# %%
coins = 20 if SMOKE else 1000


def coin(theta, t):
    """Many copies of the coin, each with a logit of its own."""

    def model():
        with pyro.plate("data", coins):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            pyro.factor("cost", (b - t).square())

    def guide():
        logit = pyro.param("logit", torch.full((coins,), theta).logit())
        with pyro.plate("data", coins):
            pyro.sample("b", dist.Bernoulli(logits=logit))

    pyro.clear_param_store()
    return model, guide


def practised(score, programs):
    """An objective whose estimator has been trained for a while."""
    torch.manual_seed(0)
    ready = ELBO(score=score, kl_weight=0.0).prepare(*programs)
    optimiser = torch.optim.Adam(ready.parameters(), lr=0.01)
    for _ in range(5 if SMOKE else 600):
        optimiser.zero_grad()
        surrogate, _ = ready(*programs)
        (-surrogate).backward()
        optimiser.step()
    return ready


cases = ((0.5, 0.45), (0.3, 0.499), (0.1, 0.45))
measured, errors, factors = {}, {}, {}
for theta, t in cases:
    programs = coin(theta, t)
    scores = {
        "REINFORCE": Reinforce(),
        "running average": RunningAverage(),
        "ARM": ARM(),
        "DisARM": DisARM(),
        "Enumerate": Enumerate(),
    }
    of_coin = {name: ELBO(score=score, kl_weight=0.0) for name, score in scores.items()}
    of_coin["LeaveOneOut(2)"] = ELBO(2, score=LeaveOneOut(), kl_weight=0.0)
    for score in (REBAR(), RELAX(hidden=(10,))):
        ready = practised(score, programs)
        name = type(score).__name__
        of_coin[f"{name}, trained"] = ready  # what it has learnt goes on
        factors[name, theta] = ready.parameters()[0].item()
    found = gradient_variance(*programs, objectives=of_coin, draws=10 if SMOKE else 400)
    true = theta * (1 - theta) * (1 - 2 * t)
    case = f"theta {theta}, t {t}"
    for name in of_coin:
        mean = found.mean[name]["guide.logit"].mean().item()
        variance = found.variance[name]["guide.logit"].mean().item()
        measured[name, case] = variance
        error = math.sqrt(variance / (coins * found.draws))
        errors[name, case] = abs(mean - true) / (error + 1e-7)  # single precision

coin_table = pd.DataFrame(
    {
        (case, what): {
            name: measured[name, case]
            if what == "measured"
            else known(theta, t).get(name, math.nan)
            for name in known(0.5, 0.45) | {"REBAR, trained": 0, "RELAX, trained": 0}
        }
        for theta, t in cases
        for case in [f"theta {theta}, t {t}"]
        for what in ("measured", "exact")
    }
)
coin_table.map(lambda value: "-" if math.isnan(value) else f"{value:.2e}")

# %%
print(f"means are off by {max(errors.values()):.1f} standard errors at most")
ratios = [measured[name, f"theta {a}, t {t}"] / value
          for a, t in cases for name, value in known(a, t).items() if value > 0]  # fmt: skip
print(f"measured / exact variance: {min(ratios):.3f} to {max(ratios):.3f}")
assert SMOKE or (max(errors.values()) < 5 and 0.95 < min(ratios) < max(ratios) < 1.05)

# %% [markdown]
# Read a column from the top. REINFORCE pays for the height of the cost, and all others have taken it
# off. (The mean cost of earlier steps is known well here, from a thousand coins at each step, which
# flatters the running average.) For $\theta = \frac12$ two of them have no variance at all. There the mean
# cost is the best constant to take off, and DisARM's partner is always the opposite side. (What is
# measured of the first is the noise of the mean itself.)
#
# REBAR gains nothing on this example, and its factor knows that:

# %%
for theta, t in cases:
    print(f"theta {theta}, t {t}: trained factor {factors['REBAR', theta]:.3f}")

# %% [markdown]
# Its baseline is the cost read between 0 and 1. For $(b - t)^2$ that falls almost to zero in the middle
# and rises again, and it says nothing about the step from 0 to 1. RELAX was made with this example: its
# network is free to be anything in between. On belief networks, where the cost is smoother, REBAR does
# well (tutorial 12).
#
# ## A little wrong, and smooth
#
# There is another way out: pretend that the draw is smooth. `families.Concrete` puts a number between
# 0 and 1 in place of the draw while it is trained, $\sigma((\phi + \text{noise}) / \lambda)$, and
# `families.StraightThrough` draws 0 or 1 and takes its gradient from such a number. Both have paths.
# Neither gradient is that of the bound. How far off are they? On a belief network with four units,
# where `Enumerate` goes through all 16 states of a row, so that the exact gradient is known:

# %%
with torch.no_grad():
    for value in (*sbn.parameters(), *plain.parameters()):
        value.add_(0.5 * torch.randn_like(value))
rows = sbn(size=20).detach()
unbiased = {
    "Enumerate": ELBO(score=Enumerate()),
    "DisARM": ELBO(score=DisARM()),
    "REINFORCE": ELBO(),
}
draws = 20 if SMOKE else 4000
honest = gradient_variance(sbn, plain, rows, objectives=unbiased, draws=draws)
true = {key: value for key, value in honest.mean["Enumerate"].items() if key.startswith("guide")}
length = sum(value.square().sum() for value in true.values()).sqrt().item()


def off(found, name):
    """Distance from mean to truth, over the length of the truth, without the noise of the mean."""
    square = sum(
        (found.mean[name][key] - value).square().sum() - found.se[name][key].square().sum()
        for key, value in true.items()
    )
    return max(0.0, square.item()) ** 0.5 / length


temperatures = (0.25, 0.5, 1.0, 2.0)
smooth = {}
for family in (families.StraightThrough, families.Concrete):
    for temperature in temperatures:
        other = Amortized(sbn, hidden=(), family=family(temperature=temperature))
        other.load_state_dict(plain.state_dict())
        found = gradient_variance(sbn, other, rows, objectives={"path": ELBO()}, draws=draws)
        smooth[family.__name__, temperature] = {
            "bias": off(found, "path"),
            "sd": found.total("path", "guide") ** 0.5 / length,
            "reported as the bound": found.bounds["path"][0],
        }

fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
for ax, what in zip(axes, ("bias", "sd"), strict=True):
    for name in ("StraightThrough", "Concrete"):
        ax.plot(temperatures, [smooth[name, t][what] for t in temperatures], "o-", label=name)
    ax.set(xscale="log", yscale="log", xlabel=r"temperature $\lambda$")
    ax.set_xticks(temperatures, [str(t) for t in temperatures])
    ax.minorticks_off()
for name, color in (("DisARM", "C2"), ("REINFORCE", "C3")):
    level = honest.total(name, "guide") ** 0.5 / length
    axes[1].axhline(level, color=color, linestyle=":", label=name)
axes[0].set(title="bias / length of the gradient")
axes[1].set(title="sd of one estimate / length of the gradient")
axes[1].legend(frameon=False, fontsize=8, loc="center", bbox_to_anchor=(0.6, 0.7))
plt.show()

# %%
print(
    f"exact: bound {honest.bounds['Enumerate'][0]:.3f}, length of the guide's gradient {length:.3f}"
)
for name in ("DisARM", "REINFORCE"):
    level = honest.total(name, "guide") ** 0.5 / length
    print(f"{name}: bias {off(honest, name):.3f} as far as can be told, sd {level:.3f}")
pd.DataFrame(smooth).T.rename_axis(["family", "temperature"]).round(3)

# %% [markdown]
# Each trades bias for noise. At a temperature of 0.5 both are off by about a tenth of the gradient. At
# 0.25 it is less, and they are noisier than DisARM, which has no bias. What `Concrete` reports while
# it trains is no bound, and it is too high here. (In evaluation mode its draws are rounded,
# so `elbo` gives a bound again.)
#
# Why use them at all? They take one run of the programs, and they ask nothing but a smooth model.
#
# ## When is each possible
#
# | estimator | the draw | the cost | bias | runs |
# |---|---|---|---|---|
# | path: `ELBO()` | continuous, with a path | has a slope | none | 1 |
# | `StickingTheLanding()` | the same | and model and guide share no parameters | none | 1 |
# | `DReG()`, for `IWAE` | the same | the same | none | $K$ |
# | `Reinforce()` | any | any | none | 1 |
# | `RunningAverage()`, `NVIL()` | any | any | none | 1 |
# | `LeaveOneOut()` | any | any | none | $K \ge 2$ |
# | `ARM()`, `DisARM()` | Bernoulli | any | none | 1 + number of sites |
# | `REBAR()`, `RELAX()` | Bernoulli | can be read between 0 and 1 | none | 1 + number of sites |
# | `Enumerate()` | finitely many states | any | none, and no noise | number of states |
# | `families.StraightThrough()` | Bernoulli | can be read between 0 and 1 | yes | 1 |
# | `families.Concrete()` | Bernoulli | can be read between 0 and 1 | yes | 1 |
#
# ## To remember
#
# 1. If there is a path, take it. `ELBO()` does.
# 2. If there is none, take the height off: `LeaveOneOut` for any draw, `DisARM` for binary ones.
# 3. Measure before you tune: `gradient_variance` gives the noise of each estimator at your parameters.
# 4. More particles are not more signal for a guide, unless the estimator sees to it.
#
# The headline of this page, asserted: both variances meet their formulas; by score a VAE is behind by
# more than two nats; sticking the landing leaves no variance at the posterior; the signal of IWAE falls
# with K where that of DReG rises; smooth draws are biased where DisARM is not.

# %%
if not SMOKE:
    assert max(apart.values()) < 0.05
    path, score = (table[name]["ELBO of test rows"] for name in ("path", "score"))
    assert path - score > 2.0
    at_posterior = landing.loc["posterior means moved by 0.0"]
    assert at_posterior["sticking the landing"] < 1e-20
    assert at_posterior["ELBO"] > 0.1
    wide_slopes = slopes.loc["guide 1.2 times as wide"]
    assert wide_slopes["IWAE, guide"] < -0.3
    assert wide_slopes["DReG, guide"] > 0.3
    assert off(honest, "DisARM") < 0.05 < smooth["Concrete", 0.5]["bias"]
"all as promised"
