# %% [markdown]
# # 3. Your own model
#
# A model is a Pyro function, nothing more. This one is in no zoo: we write it, and everything that you
# have seen so far works on it. By the end you will have
#
# - written a model with a number that all rows share, and three hidden values for each row, one of
#   them a yes or no,
# - fitted it in minibatches, with a guide made from the model and with a guide written by hand,
# - summed the yes or no out, so that NUTS can check the guides, and checked NUTS against a sum,
# - predicted how wrong the first guide's error bar would be, and mended it,
# - met the messages for the most common mistakes, and saved your own functions.

# %%
import math
import os
import tempfile

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import Amortized, families, for_model
from ppl_models.core.sites import site_table
from ppl_models.evaluate import elbo, encode
from ppl_models.infer import ELBO, fit, sample
from ppl_models.runs import load_run, save_run

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## The story
#
# Sixty patients with a fever are given a pill. Each measures his fever three times before and three
# times after. (We count degrees Celsius above 37.) How many degrees does the pill take off?
#
# It is not as simple as a difference of means, because
#
# - **some did not take it.** From the pills that came back we know that about 30 % did not, but not
#   who. *(hidden, one for each patient, yes or no)*
# - **people differ**: the same pill takes off more here and less there. *(hidden, one for each
#   patient, positive)*
# - **thermometers are noisy**, by half a degree, so even the fever before is not known. *(hidden, one
#   for each patient)*
#
# And the **effect** of the pill itself is hidden, one number for all.

# %%
SHARE, NOISE = 0.7, 0.5  # share of those who took it; error of a reading, degrees


def readings(fever):
    """Three readings of each fever."""
    return dist.Normal(fever[..., None].expand(*fever.shape, 3), NOISE).to_event(1)


def trial(before=None, after=None, *, size=None):
    effect = pyro.sample("effect", dist.Gamma(2.0, 2.0))  # one for all
    with pyro.plate("data", size if before is None else len(before)):
        taken = pyro.sample("taken", dist.Bernoulli(SHARE))  # one for each patient, from here on
        sensitivity = pyro.sample("sensitivity", dist.Gamma(25.0, 25.0))  # about 1 +- 0.2
        baseline = pyro.sample("baseline", dist.Normal(2.0, 0.7))
        before = pyro.sample("before", readings(baseline), obs=before)
        after = pyro.sample("after", readings(baseline - taken * effect * sensitivity), obs=after)
    return before, after


# %% [markdown]
# The library asks for one thing only: a plate called `data` over the rows. What is inside it is
# *local*, what is outside is *global*. Here a row comes in two parts, `before` and `after`, so a batch
# is a pair of tensors.
#
# We have no hospital, so the data are simulated, with an effect of 1.2 degrees. `poutine.condition`
# fixes one site of the story and draws the rest. The trace keeps what was drawn: the truth that we
# shall want to recover.

# %%
EFFECT = 1.2
pyro.set_rng_seed(1)
told = poutine.condition(trial, data={"effect": torch.tensor(EFFECT)})
truth = {
    name: node.get("value") for name, node in poutine.trace(told).get_trace(size=60).nodes.items()
}
before, after = truth["before"], truth["after"]
fall = (before - after).mean(1)
print(f"mean fall of the fever: {fall.mean():.2f} degrees, "
      f"among those who took the pill: {fall[truth['taken'] > 0].mean():.2f}")  # fmt: skip

# %% [markdown]
# The first number is what a naive analysis reports, and it is too low. The second one is near the
# truth, but it needs to know who took the pill.
#
# First look at the table of sites, as always, with a number of rows that occurs nowhere else:

# %%
print(site_table(trial, before[:7], after[:7]))

# %% [markdown]
# `effect` is global, a single number: batch `()`. The other latents have one value for each of the
# seven rows: batch `(7,)`, event `()`. A row of `before` is a vector of three. If yours does not look
# like this, mend it before you go on.
#
# A detail that pays off later: `fever[..., None]` adds a dimension on the *right*, and leaves whatever
# is on the left alone. Several particles at once need a dimension there.
#
# ## Which guides fit?

# %%
choices = for_model(trial, example=(before, after))
print("\n".join(str(choices).splitlines()[:4]))

# %% [markdown]
# (`print(choices)` goes on with the families that can serve each site, and says why the others
# cannot.) So we take `Amortized`: a network reads the six readings of a patient and puts out the
# distributions of his three hidden values. The global `effect` gets free parameters. Each site gets a
# family that suits its values, unless you choose one by name:

# %%
torch.manual_seed(0)
guide = Amortized(
    trial,
    example=(before, after),  # a batch to look at the model with
    hidden=(32,),
    family={"sensitivity": families.Gamma()},  # the others get a default
)
for name, family in guide.families.items():
    print(f"{name:12} {family.name:10} draw of shape {tuple(guide(before, after)[name].shape)}")

# %% [markdown]
# `Normal` for `effect`, which must be positive, means a normal on the logarithm. `taken` got a
# Bernoulli.
#
# ## Fitting, in minibatches
#
# Twenty patients a step. `fit` multiplies the terms of the rows by three and leaves that of the global
# effect alone. Gradients with respect to yes or no are noisy, so each step averages ten particles.

# %%
steps = 20 if SMOKE else 2000
options = {
    "steps": steps,
    "batch_size": 20,
    "objective": ELBO(particles=10),
    "lr": 0.02,
    "schedule": lambda optimizer: CosineAnnealingLR(optimizer, steps),
    "seed": 0,
    "progress": False,
}
result = fit(trial, guide, (before, after), **options)
result.plot()

# %% [markdown]
# ## Is it right?
#
# ### A witness: NUTS, with the yes or no summed out
#
# NUTS follows a gradient, and a yes or no has none. But each patient's two cases can be *summed
# over*, and what is left is continuous. Mark the site for it: write
# `pyro.sample("taken", ..., infer={"enumerate": "parallel"})`, or mark all discrete sites at once, from
# outside:

# %%
marked = config_enumerate(trial, default="parallel")
print(site_table(marked, before[:7], after[:7]))

# %%
posterior = sample(
    marked,
    before,
    after,
    chains=2,
    draws=10 if SMOKE else 150,
    warmup=10 if SMOKE else 100,
    seed=0,
    progress=False,
)
posterior.plot(sites="effect")

# %% [markdown]
# ### A second witness, who witnesses the first: a sum
#
# Only one number is shared by all. Given the effect, patients are independent, and for each one the
# sum over `taken`, an integral over `baseline` (a normal: in closed form) and one over `sensitivity`
# (on a grid) remain. So the posterior of the effect can be computed to any precision. With two global
# numbers it would still work, with ten it would not: hence guides.

# %%
grid = torch.linspace(0.6, 1.8, 121, dtype=torch.float64)  # of the effect
fine = torch.linspace(0.3, 2.2, 191, dtype=torch.float64)  # of the sensitivity
weights = dist.Gamma(25.0, 25.0).log_prob(fine) + math.log(fine[1] - fine[0])
six = torch.cat([before, after], 1).double()
covariance = 0.7**2 * torch.ones(6, 6) + NOISE**2 * torch.eye(6)


def log_likelihood(drop):
    """Log-density of the six readings, for each drop (rows of the result) and each patient."""
    loc = 2.0 - torch.cat([torch.zeros(len(drop), 3), drop[:, None].expand(-1, 3)], 1)
    return dist.MultivariateNormal(loc[:, None].double(), covariance.double()).log_prob(six)


no = math.log(1 - SHARE) + log_likelihood(torch.zeros(1))[0]
yes = torch.stack(
    [
        math.log(SHARE) + (log_likelihood(effect * fine) + weights[:, None]).logsumexp(0)
        for effect in grid
    ]
)
log_joint = torch.logaddexp(yes, no).sum(1) + dist.Gamma(2.0, 2.0).log_prob(grid)
density = log_joint.softmax(0)
exact_mean = (density @ grid).item()
exact_scale = (density @ (grid - exact_mean) ** 2).sqrt().item()
log_evidence = (log_joint.logsumexp(0) + math.log(grid[1] - grid[0])).item() / len(before)

nuts_mean, nuts_scale = posterior.mean()["effect"].item(), posterior.scale()["effect"].item()
nuts_error = posterior.mcse()["effect"].item()
print(f"the sum: {exact_mean:.3f} +- {exact_scale:.3f}")
print(
    f"NUTS:    {nuts_mean:.3f} +- {nuts_scale:.3f}, Monte Carlo error of the mean {nuts_error:.3f}"
)
assert SMOKE or abs(nuts_mean - exact_mean) < 5 * nuts_error

# %% [markdown]
# ### And the guide

# %%


def moments(guide, draws=4000):
    """Mean and standard deviation of the effect under a guide."""
    with torch.no_grad():
        values = [poutine.trace(guide).get_trace(before, after).nodes["effect"]["value"]
                  for _ in range(50 if SMOKE else draws)]  # fmt: skip
    return torch.stack(values).mean().item(), torch.stack(values).std().item()


table = pd.DataFrame(columns=["mean", "sd"])
table.loc["the sum"] = exact_mean, exact_scale
table.loc["NUTS"] = nuts_mean, nuts_scale
table.loc["Amortized"] = moments(guide)
table["sd / sd by NUTS"] = table["sd"] / nuts_scale
table.round(3)

# %% [markdown]
# The mean is right, the standard deviation is about half of what it should be. The bound climbed, all
# looked well, and the guide is far too sure. Why?
#
# The guide draws `effect` first, and then the patients' values *without looking at it*. In the
# posterior they are tied: were the effect larger, the sensitivities of all who took the pill would
# have to be smaller. Given the sensitivities, the effect is known quite well. The guide, to which they
# are independent, reports only that remaining doubt. For such a *mean-field* guide it can be computed:
# the best $q(\mathrm{effect})$ has the precision that the effect would have if everything else were
# known, averaged over the guide,
#
# $$\frac{1}{\mathrm{sd}^2} \approx \sum_n \mathbb{E}_q[\mathrm{taken}_n \, \mathrm{sensitivity}_n^2]
#   \cdot \frac{3}{0.5^2}.$$

# %%
with torch.no_grad():
    drawn = [guide(before, after) for _ in range(10 if SMOKE else 200)]
precision = torch.stack([(d["taken"] * d["sensitivity"] ** 2).sum() for d in drawn]).mean()
predicted = (precision * 3 / NOISE**2).item() ** -0.5
print(f"sd by the guide {table.loc['Amortized', 'sd']:.4f}, by the formula {predicted:.4f}")

# %% [markdown]
# So this is no fault of the fit: it found the best that the family has. More steps will not help,
# another guide will.
#
# ## A guide written by hand
#
# A guide is a function too: same arguments, same latents, same plate. It may draw them in any order,
# and each may look at those before it. What it learns, it asks of `pyro.param`. This one draws the
# effect, then everything else *given* the effect:
#
# - who took the pill: the odds depend on the fall of the fever and on the effect,
# - the sensitivity: close to 1 for those who did not; for the others it depends on both,
# - the baseline: given the rest, all is linear and normal, so we know it. No parameter is needed.


# %%
def number(name, value):
    return pyro.param(name, torch.tensor(value))


def positive(name, value):
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def by_hand(before, after):
    fall = (before - after).mean(-1)
    q_effect = dist.LogNormal(number("effect.loc", 0.0), positive("effect.scale", 0.5))
    effect = pyro.sample("effect", q_effect)
    with pyro.plate("data", len(before)):
        odds = number("a", 0.0) + effect * (number("b", 0.0) * fall + number("c", 0.0) * effect)
        taken = pyro.sample("taken", dist.Bernoulli(logits=odds))
        loc = taken * (number("d", 0.0) + number("e", 0.0) * fall + number("f", 0.0) * effect)
        scale = torch.where(taken > 0, positive("scale.yes", 0.2), positive("scale.no", 0.2))
        sensitivity = pyro.sample("sensitivity", dist.LogNormal(loc, scale))
        precision = 1 / 0.7**2 + 6 / NOISE**2
        before_all = before.sum(-1) + (after + (taken * effect * sensitivity)[..., None]).sum(-1)
        mean = (2.0 / 0.7**2 + before_all / NOISE**2) / precision
        pyro.sample("baseline", dist.Normal(mean, precision**-0.5))


pyro.clear_param_store()
result_by_hand = fit(trial, by_hand, (before, after), **options)
table.loc["by hand"] = *moments(by_hand), 0.0
table["sd / sd by NUTS"] = table["sd"] / nuts_scale
table.round(3)

# %% [markdown]
# Ten numbers instead of a network of two and a half thousand, and an error bar that can be used. What does the
# bound say? The sum gave us the evidence of the whole data set, so both gaps are known:

# %%
programs = {"Amortized": guide, "by hand": by_hand}
bounds = {
    name: elbo(trial, q, before, after, particles=20 if SMOKE else 500, seed=0)
    for name, q in programs.items()
}
print(f"log p(all data) / 60: {log_evidence:.4f}")
for name, bound in bounds.items():
    print(
        f"{name:10} {bound}, gap over all 60 patients {60 * (log_evidence - bound.mean):.2f} nats"
    )

# %%
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.plot(grid, density / (grid[1] - grid[0]), color="black", label="the sum")
ax.hist(posterior["effect"].flatten().cpu(), bins=30, density=True, color="0.8", label="NUTS")
with torch.no_grad():
    theirs = guide.q("effect"), dist.LogNormal(pyro.param("effect.loc"), pyro.param("effect.scale"))
    for name, q in zip(programs, theirs, strict=True):
        ax.plot(grid, q.log_prob(grid.float()).exp(), label=name)
ax.axvline(EFFECT, color="gray", linestyle=":", label="the truth")
ax.set(
    xlabel="effect, degrees",
    ylabel="posterior density",
    title="How many degrees the pill takes off",
)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# The bound does not know what you care about. It is one number for all 181 latents, and a guide that is
# a little better at each of 180 local ones may be ahead although it is wrong about the one that the
# trial was for. (The network of `Amortized` is richer there than our ten numbers.) So check the global
# latents by themselves.
#
# ## Who took the pill?
#
# `encode` returns the posterior mean of each local latent; for a yes or no that is its probability.
# The sum knows the exact ones.

# %%
exact_taken = (density[:, None] * (yes - torch.logaddexp(yes, no)).exp()).sum(0)
taken = encode(trial, by_hand, before, after, draws=50 if SMOKE else 500, seed=0)["taken"]
right = ((taken > 0.5) == (truth["taken"] > 0.5)).float().mean().item()
apart = (taken - exact_taken).square().mean().sqrt().item()
print(f"right about {right:.0%} of the patients")
print(f"distance to the exact probabilities: {apart:.3f} (root mean square)")

fig, ax = plt.subplots(figsize=(7, 3))
ax.plot(fall, exact_taken, "x", color="gray", label="exact")
for value, label in ((0.0, "did not take it"), (1.0, "took it")):
    chosen = truth["taken"] == value
    ax.plot(fall[chosen], taken[chosen], "o", ms=4, label=label)
ax.set(
    xlabel="mean fall of the fever, degrees",
    ylabel="P(taken)",
    title="By the guide written by hand",
)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# Those whose fever fell by half a degree cannot be told apart, and the guide knows it. The exact answer
# scatters a little, because it also looks at how high the fever was before: very high readings are
# partly bad luck, and fall by themselves. The guide looks at the fall only. It could be told.
#
# ## When something is wrong
#
# Mistakes that everybody makes, and what you are told. Nothing has changed after such a message: it
# comes before the first step.


# %%
def message_of(action):
    """Run what is expected to fail, and print what it says."""
    try:
        action()
    except ValueError as error:
        print(error)
    else:
        raise AssertionError("that was expected to fail")


# %% [markdown]
# **A latent forgotten in a guide:**


# %%
def forgetful(before, after):
    pyro.sample("effect", dist.LogNormal(number("effect.loc", 0.0), 0.1))
    with pyro.plate("data", len(before)):
        pyro.sample("taken", dist.Bernoulli(0.5))
        pyro.sample("sensitivity", dist.LogNormal(0.0, 0.2))


message_of(lambda: fit(trial, forgetful, (before, after)))

# %% [markdown]
# **Data of the wrong kind:** integers where the model has real numbers, then a missing reading.

# %%
message_of(lambda: fit(trial, guide, (before.round().int(), after)))
print()
gaps = before.clone()
gaps[3, 1] = torch.nan
message_of(lambda: fit(trial, guide, (gaps, after)))

# %% [markdown]
# **No plate.** It runs in Pyro, but nobody can know that the sixty numbers are rows:


# %%
def without_plate(before, after):
    effect = pyro.sample("effect", dist.Gamma(2.0, 2.0))
    baseline = pyro.sample("baseline", dist.Normal(2.0, 0.7).expand([len(before)]))
    pyro.sample("before", readings(baseline), obs=before)
    pyro.sample("after", readings(baseline - effect), obs=after)


message_of(lambda: Amortized(without_plate, example=(before, after)))

# %% [markdown]
# **A model that cannot draw rows by itself,** and no example to look at it with:

# %%
message_of(lambda: Amortized(without_plate))

# %% [markdown]
# **Minibatches with one of Pyro's AutoGuides.** They keep one set of numbers for each position in the
# batch, so the next batch would get the numbers of other patients:

# %%
message_of(lambda: fit(trial, AutoNormal(trial), (before, after), batch_size=20))

# %% [markdown]
# **NUTS on a model with a yes or no** that is not marked:

# %%
message_of(lambda: sample(trial, before, after))

# %% [markdown]
# ## Saving your own functions
#
# A run folder holds numbers, not code. What `pyro.param` made is saved with the run, under its names;
# the functions are yours to pass in again. In a new session, where nothing has been fitted:

# %%
folder = tempfile.mkdtemp()
save_run(folder, result_by_hand, info={"effect": EFFECT})
pyro.clear_param_store()  # as in a new session
run = load_run(folder, model=trial, guide=by_hand)
again = elbo(run.model, run.guide, before, after, particles=20 if SMOKE else 500, seed=0)
print(f"saved with it: {run.info}")
print(f"before {bounds['by hand'].mean:.6f}, after {again.mean:.6f}")
assert abs(again.mean - bounds["by hand"].mean) < 1e-6

# %% [markdown]
# ## To remember
#
# 1. A function and a plate called `data` are enough.
# 2. `site_table` first; then fit; then check the global numbers against NUTS.
# 3. A guide that draws rows without looking at the global latents is too sure of those. Trust its means
#    rather than its error bars, or write one that looks.
# 4. A small case with an exact answer is worth a lot: here it vouched for NUTS, and NUTS for the rest.
#
# The headline of this page, asserted. Both guides find the mean that NUTS finds, within half a
# posterior standard deviation. The scale of the first is what theory says a mean-field guide can
# reach, within a tenth, and that is far below 1. The scale of the second is that of NUTS within a
# quarter (its families are still simple, and 300 draws know a scale to about a tenth). The truth lies
# within two standard deviations. And no bound is above the evidence.

# %%
if not SMOKE:
    for name in programs:
        assert abs(table.loc[name, "mean"] - nuts_mean) < 0.5 * nuts_scale
        assert bounds[name].mean < log_evidence + 5 * bounds[name].se
    assert abs(table.loc["Amortized", "sd"] / predicted - 1) < 0.1
    assert table.loc["Amortized", "sd / sd by NUTS"] < 0.75
    assert 0.8 < table.loc["by hand", "sd / sd by NUTS"] < 1.25
    assert abs(table.loc["by hand", "mean"] - EFFECT) < 2 * table.loc["by hand", "sd"]
    assert apart < 0.1
"all as promised"
