# %% [markdown]
# # 4. NUTS on torch
#
# NUTS draws from a posterior and needs nothing but the model. All guides of this library are checked
# against it. Here you see how it works, and when to believe it. By the end you will have
#
# - sampled one posterior with 4 chains and with 1024, by the same call,
# - read every number that a `Posterior` prints about itself,
# - seen the two ways in which a sampler fails, divergences and slow tails, and mended both,
# - sampled hundreds of posteriors at once, one for each row, and compared them with the exact ones,
# - started chains from a fitted guide, and measured what compiling costs.
#
# [docs/nuts.md](../docs/nuts.md) has the details.

# %%
import os
import tempfile

import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

from guides import Amortized
from ppl_models import PPCA, VAE
from ppl_models.data import linear_gaussian, load
from ppl_models.infer import NUTS, Posterior, fit, sample

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
short = {"draws": 10, "warmup": 20} if SMOKE else {}  # of 1000 draws after 1000 of warm-up
quiet = {"seed": 0, "progress": False}

# %% [markdown]
# ## Eight schools
#
# Eight schools coached their pupils for a test (Rubin, 1981). Each reports by how many points that
# helped, `y`, and the standard error of its report, `scale`. The true effects `theta` differ from
# school to school by an unknown amount `tau`, around an unknown mean `mu`.

# %%
y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
scale = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools(scale, y=None):
    mu = pyro.sample("mu", dist.Normal(scale.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(scale.new_tensor(5.0)))
    with pyro.plate("data", len(scale)):
        z = pyro.sample("z", dist.Normal(scale.new_zeros(()), 1.0))
        theta = pyro.deterministic("theta", mu + tau * z)
        return pyro.sample("y", dist.Normal(theta, scale), obs=y)


posterior = sample(schools, scale, y, chains=4, **short, **quiet)
print(posterior)

# %% [markdown]
# ## Reading it
#
# The first lines say what was run and how it went, the table has a line for each unknown.
#
# - `mean` and `sd` are those of the posterior. `mcse` is the Monte Carlo error of `mean`: what other
#   random draws would change. It is not the uncertainty of the unknown, which is `sd`.
# - `ess_bulk` is how many independent draws would give that error; `ess_tail` is the same for the
#   quantiles `5%` and `95%`. It can exceed the number of draws: consecutive draws of NUTS tend to lie
#   on opposite sides of the mean. `ess_bulk/s` counts the seconds of compiling and of warm-up too.
# - `r_hat` compares the spread between chains with the spread within. Above 1.01, chains have not seen
#   the same posterior. (It needs several chains: one that never leaves its mode looks fine to itself.)
# - A **divergence** is a trajectory whose simulation went wrong: the density bends too sharply there
#   for the step size. Draws near that place are missing, and nobody knows how many.
# - **Depth**: a trajectory doubles until it turns back, 10 times at most. One that is cut short costs
#   time and mixes slowly, but is correct.
# - **E-BFMI** says how freely the energy changes from draw to draw. Below 0.3 tails are reached slowly.
#
# All of it can be had by itself:

# %%
print(f"R-hat of tau          {posterior.rhat()['tau']:.3f}")
print(
    f"ESS, bulk and tail    {posterior.ess('bulk')['tau']:.0f}, {posterior.ess('tail')['tau']:.0f}"
)
print(f"MCSE of mean and sd   {posterior.mcse()['tau']:.3f}, {posterior.mcse('sd')['tau']:.3f}")
print(f"divergences           {posterior.divergences.tolist()}")
print(f"E-BFMI                {[round(value, 2) for value in posterior.ebfmi().tolist()]}")
print(f"step size             {[round(value, 2) for value in posterior.step_size.tolist()]}")
print(f"acceptance            {[round(value, 2) for value in posterior.accept.tolist()]}")
print(f"depth, most and mean  {posterior.depth.max()}, {posterior.depth.double().mean():.2f}")
print(f"leapfrogs a draw      {posterior.leapfrogs.double().mean():.1f}")

# %%
fig = plt.figure(figsize=(9, 3.4))
posterior.plot(sites=["mu", "tau"], figure=fig)
plt.show()

# %% [markdown]
# Chains that agree lie on top of each other on the left, and look like noise without a pattern on
# the right.
#
# ## One tick
#
# NUTS gives the current point a random push and follows it as a marble that rolls over minus the log
# density, in *leapfrog* steps, each of which costs one gradient. It doubles the path, forward or
# backward in time, until the marble turns back, and then picks one of the points on the path. So paths
# differ in length: one transition may take 3 steps and the next one 31. If chains went side by side,
# one transition at a time, all would wait for the longest path.
#
# Here they go side by side by single steps. A *tick* is one leapfrog step of every chain: one call of
# the model's gradient for all of them together, and then, for each chain by itself, the bookkeeping:
# has this part of the path turned, is the path complete, which point is picked? A chain whose path
# ends writes its draw and starts its next path in the same tick. There is no Python in a tick, so it
# is compiled, and its cost grows more slowly than the number of chains. That is why many chains are
# cheap here.
#
# ## From 4 chains to 1024
#
# The same call. (On a GPU, `device="cuda"`, nothing else.) From 16 chains on, they learn one
# step size and one metric together, so a shorter warm-up does.

# %%
many = sample(
    schools,
    scale,
    y,
    chains=32 if SMOKE else 1024,
    draws=10 if SMOKE else 250,
    warmup=20 if SMOKE else 250,
    device=device,
    **quiet,
)


def line(posterior, site):
    """What to look at first, of one site."""
    return {
        "draws": posterior.chains * posterior.draws,
        "mean": posterior.mean()[site].item(),
        "mcse": posterior.mcse()[site].item(),
        "sd": posterior.scale()[site].item(),
        "least": posterior[site].min().item(),
        "ESS": posterior.ess()[site].item(),
        "R-hat": posterior.rhat()[site].item(),
        "divergences": int(posterior.divergences.sum()),
        "E-BFMI": posterior.ebfmi().min().item(),
        "leapfrogs": posterior.leapfrogs.double().mean().item(),
    }


runs = {"4 chains x 1000": posterior, "1024 chains x 250": many}
pd.DataFrame([line(run, "tau") for run in runs.values()], index=list(runs)).round(3)

# %%
print(f"seconds, warm-up and compiling included: {posterior.seconds:.1f} and {many.seconds:.1f}")
print(f"transitions that diverged: {many.divergent.double().mean():.3%}")
lost = many["tau"][many.divergent]
print(f"median of tau: {many['tau'].median():.2f}, after a divergence {lost.median():.2f}")
apart = (posterior.mean()["tau"] - many.mean()["tau"]).item()
error = posterior.mcse()["tau"].item()
print(f"tau, 4 chains less 1024: {apart:+.3f}, with a Monte Carlo error of {error:.3f}")
assert SMOKE or abs(apart) < 5 * error

# %% [markdown]
# Short chains, and many of them: what counts is the sum, once each has arrived. And 1024 chains see
# what four cannot: fewer than one transition in a thousand diverges, which four chains may never meet.
# We take this run as the truth.
#
# ## Centred or not
#
# Why `z`, and not `theta` itself? This is the same posterior, and a model that reads more naturally:


# %%
def centred(scale, y=None):
    mu = pyro.sample("mu", dist.Normal(scale.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(scale.new_tensor(5.0)))
    with pyro.plate("data", len(scale)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        return pyro.sample("y", dist.Normal(theta, scale), obs=y)


natural = sample(centred, scale, y, chains=4, **short, **quiet)
careful = sample(centred, scale, y, chains=4, sampler=NUTS(target_accept=0.99), **short, **quiet)
runs = {
    "centred": natural,
    "centred, target_accept 0.99": careful,
    "non-centred": posterior,
    "non-centred, 1024 chains": many,
}
pd.DataFrame([line(run, "tau") for run in runs.values()], index=list(runs)).round(3)

# %%
print("\n".join(str(natural).splitlines()[14:]))

# %% [markdown]
# Everything that can be said against a run is said about the first line. Where do the divergences
# sit? `plot_pairs` marks them red. (`tau` on a log scale, as the sampler sees it; a `Posterior` can be
# made of any draws.)


# %%
def seen(posterior, theta):
    """Draws of one school's effect beside log tau."""
    draws = {"log tau": posterior["tau"].log(), "theta of school 1": theta[..., 0]}
    return Posterior(draws, divergent=posterior.divergent)


effects = posterior["mu"][..., None] + posterior["tau"][..., None] * posterior["z"]
views = {"centred": seen(natural, natural["theta"]), "non-centred": seen(posterior, effects)}
fig = plt.figure(figsize=(11, 5))
for part, (name, view) in zip(fig.subfigures(1, 2), views.items(), strict=True):
    view.plot_pairs(figure=part)
    part.suptitle(name)
plt.show()

# %%
lost = natural["tau"][natural.divergent]
print(f"median of tau: {natural['tau'].median():.2f}, after a divergence {lost.median():.2f}")
for name, run in runs.items():
    print(f"draws with tau below 0.5: {(run['tau'] < 0.5).double().mean():6.2%}  {name}")

# %% [markdown]
# Where `tau` is small, all `theta` must be close to `mu`: the posterior narrows to a neck, and a step
# that is right for its wide part is too long for the neck. The chain is turned away at its entrance,
# and that is where the red dots are. What is behind is missing, and no number in the column `mean` tells
# you.
#
# A higher `target_accept` makes smaller steps: more of the neck is reached, at more than three times
# the gradients, and it is still not enough. The non-centred form has no neck: `z` is a standard normal
# whatever `tau` is. So reparametrise first; raise `target_accept` for what is left. (The
# few divergences of the 1024 chains sit elsewhere, at a larger `tau` than the median.)
#
# ## The funnel
#
# The neck by itself, without data, so that the truth is known (Neal, 2003): $v \sim
# \mathcal{N}(0, 3)$, and nine numbers $x_i \sim \mathcal{N}(0, e^{v/2})$.


# %%
def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("axes", 9):
        pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))


half = {"draws": 10, "warmup": 20} if SMOKE else {"draws": 500, "warmup": 500}
chains = 16 if SMOKE else 64
wide = {
    f"target_accept {target}": sample(
        funnel, chains=chains, sampler=NUTS(target_accept=target), **half, **quiet
    )
    for target in (0.8, 0.99)
}
# The non-centred form from outside, without a change to the model:
straight = poutine.reparam(funnel, config={"x": LocScaleReparam(0.0)})
brief = {"draws": 10, "warmup": 20} if SMOKE else {"draws": 250, "warmup": 200}
wide["reparametrised"] = sample(straight, chains=chains, **brief, **quiet)
table = pd.DataFrame([line(run, "v") for run in wide.values()], index=list(wide))
table["stuck chains"] = [int(run.stuck.sum()) for run in wide.values()]
table.round(3)

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
drawn = wide["reparametrised"]
x = drawn["x_decentered"] * (drawn["v"] / 2).exp()[..., None]
pictures = {
    "target_accept 0.8": (wide["target_accept 0.8"]["v"], wide["target_accept 0.8"]["x"]),
    "reparametrised": (drawn["v"], x),
}
for ax, (name, (v, x)) in zip(axes, pictures.items(), strict=True):
    v, x = v[:, ::10].flatten(), x[:, ::10, 0].flatten()
    ax.scatter(x, v, s=4, alpha=0.4, linewidths=0)
    ax.axhline(-4.93, color="gray", linestyle=":")
    ax.set(xlim=(-30, 30), ylim=(-11, 11), xlabel="$x_1$", title=name)
axes[0].set_ylabel("$v$")
fig.tight_layout()
plt.show()

# %%
for name, run in wide.items():
    print(f"v below -4.93, 5 % in truth: {(run['v'] < -4.93).double().mean():6.2%}  {name}")

# %% [markdown]
# The truth is a mean of 0 and a standard deviation of 3. The dotted line is the 5 % quantile of `v`.
#
# - **As it is**, the sampler does not get down the neck, and once in the wide part it stays there for
#   long. R-hat, ESS and E-BFMI say so: the thousands of draws are worth less than two hundred.
# - **A higher `target_accept`** reaches further down, for more gradients, but a step that
#   suits the neck is tiny in the wide part: there is no step that suits both. Some chains
#   are *stuck*. They are named, and kept in the draws, because leaving out those who suffer most would
#   make the rest look better than it is.
# - **Reparametrised**, it is ten independent normals. All warnings are gone.
#
# When is the centred form the better one? Where data say much about each `theta`: then the neck is cut
# off by the data, and it is `z` that would be tied to `tau`. Try both; divergences tell.
#
# ## One posterior for each row
#
# In PPCA or a VAE each row has its own `z`, and with the parameters fixed the rows are independent.
# `rows=True` says so: each row is a target of its own, with its own step size, metric and
# trajectories. 300 rows times 4 chains advance in one batch of 1200. In PPCA the posterior is known:

# %%
truth = linear_gaussian(300, data_dim=8, latent_dim=2, noise_scale=0.5, seed=0)
ppca = PPCA(data_dim=8, latent_dim=2)
with torch.no_grad():
    ppca.loading.copy_(truth.loading)
    ppca.loc.copy_(truth.loc)
    ppca.log_noise_scale.fill_(torch.tensor(truth.noise_scale).log())
some = truth.x[:20] if SMOKE else truth.x
per_row = sample(ppca, some, rows=True, **brief, **quiet)
with torch.no_grad():
    exact = ppca.posterior(some)
    z_scores = (per_row.mean()["z"] - exact.mean) / per_row.mcse()["z"]
    ratios = per_row.scale()["z"] / exact.stddev
print(f"draws of shape {tuple(per_row['z'].shape)}: chains, draws, rows, event")
print(f"step sizes of shape {tuple(per_row.step_size.shape)}, {per_row.seconds:.1f} s")
print(f"errors of the {z_scores.numel()} means, in Monte Carlo standard errors: "
      f"root mean square {z_scores.square().mean().sqrt():.2f}, largest {z_scores.abs().max():.1f}")  # fmt: skip
print(f"sd by NUTS / exact sd: mean {ratios.mean():.3f}, {ratios.min():.2f} to {ratios.max():.2f}")
assert SMOKE or z_scores.abs().max() < 5

# %% [markdown]
# A root mean square of 1 is what honest error bars give, and among so many elements the largest is
# about 3 by chance alone.
#
# ## Warm-up from a guide
#
# Where a guide is fitted already, it knows where the posterior is and how wide: `init=guide` starts
# chains at its draws and takes the first metric from them. A small VAE on digits:

# %%
digits = load("digits", binarize="threshold")
torch.manual_seed(0)
vae = VAE(data_dim=64, latent_dim=4, hidden=(32,))
guide = Amortized(vae, hidden=(32,))
fit(vae, guide, digits.x, epochs=2 if SMOKE else 30, lr=3e-3, seed=0, progress=False)
images = digits.x_test[: 4 if SMOKE else 16]
starts = {}
for warmup in (0, 150):
    for name, init in (("anywhere", None), ("guide", guide)):
        run = sample(
            vae,
            images,
            rows=True,
            init=init,
            draws=10 if SMOKE else 150,
            warmup=20 if SMOKE and warmup else warmup,
            **quiet,
        )
        starts[warmup, name] = {
            "largest R-hat": run.rhat()["z"].max().item(),
            "least ESS": run.ess()["z"].min().item(),
            "stuck": f"{int(run.stuck.sum())} of {run.stuck.numel()}",
        }
pd.DataFrame(starts).T.rename_axis(["warm-up", "start"])

# %% [markdown]
# Without any warm-up, chains from anywhere are lost, and those from the guide give draws that can be
# used. With enough of it the start is forgotten, as it should be: the guide saves time, and does not
# change the answer. (A guide that misses a mode starts no chain there. Where you suspect several
# modes, start anywhere.)
#
# ## What compiling costs
#
# Before the first tick, the model is run under Pyro's handlers and recorded. Then the recording can be
# run as it is (`compile=False`), or be compiled to one function first (`compile="now"`). A compiled
# tick is kept in a cache, for the same model, number of chains and number of draws. With an empty one:

# %%
folder = tempfile.mkdtemp()
before = os.environ.get("PPL_MODELS_CACHE")
os.environ["PPL_MODELS_CACHE"] = folder
small = {"draws": 10, "warmup": 20} if SMOKE else {"draws": 200, "warmup": 200}
now = False if SMOKE else "now"
for name, compiled in (("recorded", False), ("compiled", now), ("compiled, from the cache", now)):
    run = sample(schools, scale, y, chains=4, compile=compiled, **small, **quiet)
    print(f"{run.seconds:5.1f} s  {name}")
if before is None:
    del os.environ["PPL_MODELS_CACHE"]
else:
    os.environ["PPL_MODELS_CACHE"] = before

# %% [markdown]
# So a short run is not worth a compiler, and a second one like it is. The default, `compile=True`,
# compiles what looks long enough, taking eight leapfrogs for a transition. If your posterior needs
# hundreds of them, say "now". (Seconds are of one machine, with neighbours; yours will differ.)
#
# ## To remember
#
# 1. Look at R-hat, ESS and divergences before you look at the mean. `print(posterior)` says what to do.
# 2. A divergence is a place that is missing. Find it with `plot_pairs`; reparametrise, then raise
#    `target_accept`.
# 3. Chains are cheap here. Many short ones, once they have arrived, are as good as a few long ones.
# 4. Rows that are independent given the parameters: `rows=True`. A guide at hand: `init=guide`.
#
# The headline of this page, asserted: 4 chains and 1024 agree; the centred form diverges ten times as
# often and hardly reaches small `tau`; the reparametrised funnel has its standard deviation of 3, and
# the plain one has too few draws in its neck; rows agree with the exact posterior.

# %%
if not SMOKE:
    rhat = posterior.rhat()
    divergences = {name: int(run.divergences.sum()) for name, run in runs.items()}
    assert max(value.max().item() for value in rhat.values()) < 1.01
    assert divergences["centred"] > 10 * max(1, divergences["non-centred"])
    below = {name: (run["tau"] < 0.5).double().mean().item() for name, run in runs.items()}
    assert below["centred"] < 0.5 * below["non-centred, 1024 chains"]
    assert abs(wide["reparametrised"]["v"].std().item() - 3.0) < 0.15
    neck = {name: (run["v"] < -4.93).double().mean().item() for name, run in wide.items()}
    assert neck["target_accept 0.8"] < 0.03 < neck["reparametrised"]
    assert abs(z_scores.square().mean().sqrt().item() - 1.0) < 0.25
"all as promised"
