# %% [markdown]
# # 1. A model, its posterior, and what the shapes say
#
# You know torch and some statistics. You have not used Pyro. By the end you will have
#
# - written a generative model as a Python function of ten lines,
# - learnt to read *batch* and *event* shapes, and met three mistakes that everybody makes once,
# - checked an approximate posterior against an exact one, in two independent ways,
# - fitted the model, and seen the fit reach a maximum that is known in closed form.
#
# The model is probabilistic PCA (Tipping & Bishop, 1999). It is small, and everything about it can
# be computed by hand. That is why it comes first: every number below is compared with one that
# cannot be wrong.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA
from torch.distributions import constraints, kl_divergence
from torch.optim.lr_scheduler import CosineAnnealingLR

from guides import Amortized, Exact, for_model
from ppl_models import PPCA, bayesian, minibatch
from ppl_models.core.sites import site_table
from ppl_models.data import linear_gaussian, load
from ppl_models.evaluate import elbo, encode
from ppl_models.infer import ELBO, fit, sample

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 80
torch.set_num_threads(1)  # arrays this small gain nothing from more
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# %% [markdown]
# ## The story
#
# A *generative model* is a story of how the data came about. For each row $n$ of a table with $D$
# columns:
#
# $$z_n \sim \mathcal{N}(0, I_K), \qquad
#   x_n \mid z_n \sim \mathcal{N}(\mu + W z_n,\; \sigma^2 I_D).$$
#
# Each row has $K$ hidden causes $z_n$. They are drawn first, mixed by $W$, moved by $\mu$, and
# blurred by noise. We see $x_n$ only.
#
# Let us draw 500 rows whose truth we know. ($W$ is called `loading` in the code, $\mu$ is `loc`,
# and $\sigma$ is `noise_scale`.)

# %%
D, K = 8, 2
truth = linear_gaussian(500, data_dim=D, latent_dim=K, noise_scale=0.5, seed=0)
x = truth.x.to(device)
loading, loc, noise_scale = truth.loading.to(device), truth.loc.to(device), truth.noise_scale
x.shape

# %% [markdown]
# And here is the same story in Pyro. Read it next to the formula.


# %%
def story(x=None, *, size=None):
    with pyro.plate("data", size if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        mean = loc + z @ loading.mT
        return pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)


# %% [markdown]
# - `pyro.sample(name, distribution)` draws a value and gives it a name, its *site*.
# - `obs=x` says: do not draw this one, it is known. With `obs=None` it is drawn.
# - `pyro.plate("data", N)` says: what is inside happens N times, independently, once for each row.
#   There is no loop. All rows are drawn at once, and the plate adds a dimension for them.
#
# So one function does two jobs. Without data it invents rows. With data it *scores* them.

# %%
print("three new rows:", tuple(story(size=3).shape))
print("given data, x comes back as it was:", bool((story(x) == x).all()))

# %% [markdown]
# ## Reading shapes
#
# A torch distribution has two shapes. The *batch* shape counts independent draws. The *event* shape
# is the shape of one draw. `.to_event(1)` moves one dimension from batch to event: K numbers become
# one vector. The log-density of a draw is one number for each batch element, so this changes what is
# summed and what is kept.

# %%
numbers = dist.Normal(torch.zeros(K), 1.0)
for text, d in {
    "Normal(zeros(2), 1)": numbers,
    "....to_event(1)": numbers.to_event(1),
    "....to_event(1).expand([500])": numbers.to_event(1).expand([500]),
}.items():
    score = tuple(d.log_prob(d.sample()).shape)
    print(f"{text:30} batch {tuple(d.batch_shape)!s:7} event {tuple(d.event_shape)!s:5} "
          f"log_prob {score}")  # fmt: skip

# %% [markdown]
# The last line is what happens inside `plate("data", 500)`: the plate expands the distribution to
# one draw a row. **The rule: inside plates, the batch shape is the plates' sizes; everything that
# belongs to one row is event.**
#
# `site_table` runs a model once and shows whether that holds:

# %%
print(site_table(story, x))

# %% [markdown]
# Batch is `(500,)` at both sites: one draw for each row. Event is `(2,)` for `z` and `(8,)` for
# `x`: the vectors of the formula. `z` is *latent*, because nobody told its value, and *local*,
# because it is inside the plate over rows: each row has its own.
#
# Pyro has the same view built in. `poutine.trace` records a run, and `format_shapes` prints it, with
# batch on the left of the bar and event on the right. (The first site, `data`, is the plate itself.)

# %%
trace = poutine.trace(story).get_trace(x)
trace.compute_log_prob()
print(trace.format_shapes())

# %% [markdown]
# Look at the lines `log_prob`: 500 numbers at each site, one score for each row. If a `log_prob` has
# any other shape than your plates, something is wrong. Three mistakes make it wrong in most cases.
# Here they are, with the messages that you will meet.


# %%
def message_of(action):
    """Run what is expected to fail, and print what it says."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        lines = [line.rstrip() for line in str(error).splitlines()]
        print(f"{type(error).__name__}: " + "\n".join(lines))
    else:
        raise AssertionError("that was expected to fail")


# %% [markdown]
# ### Mistake 1: `.to_event(1)` forgotten


# %%
def forgot_to_event(x=None, *, size=None):
    with pyro.plate("data", size if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0))  # <- no .to_event(1)
        return pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise_scale).to_event(1), obs=x)


message_of(lambda: forgot_to_event(x))

# %% [markdown]
# How to read it: *at site z*, dimension -1 of the batch has size 2, but plate `data`, which owns
# dimension -1, has 500 rows. The 2 is our K, still in the batch. It belongs to the event:
# `.to_event(1)`.
#
# One warning. The mistake is invisible when the two sizes are equal by chance. With two rows and
# K = 2 the same model runs. Only the table shows that each row now gets *one* number, event `()`:

# %%
print(site_table(forgot_to_event, x[:2]))

# %% [markdown]
# So: try a model on a number of rows that occurs nowhere else, such as 7.
#
# ### Mistake 2: the plate has the wrong dimension, or the wrong size
#
# Plates count from the right: the innermost takes dimension -1 of the batch, the next one -2. You
# can ask for another with `dim=`, and you should not unless you have two plates. This runs:


# %%
def wrong_dim(x=None, *, size=None):
    with pyro.plate("data", size if x is None else len(x), dim=-2):  # <- rows are in -1
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise_scale).to_event(1), obs=x)


trace = poutine.trace(wrong_dim).get_trace(x)
trace.compute_log_prob()
print(trace.format_shapes())

# %% [markdown]
# It runs, and it is wrong. Look at the last line: `log_prob` is `500 500`. The model lays its rows
# out as a column, `(500, 1)`. The data are `(500,)`. Torch broadcasts, and every row of data is
# scored under every row's `z`. Pyro cannot know that this was not meant. The functions of this
# library compare the data with what the model describes, and refuse:

# %%
message_of(lambda: elbo(wrong_dim, Exact(story), x))

# %% [markdown]
# How to read it: the plates of the model make `(500, 1)` of the rows, and there is one `1` too many.
# Leave `dim=-2` out.
#
# The size goes wrong in another way. It is tempting to write the number of rows into the model:


# %%
def wrong_size(x=None, *, size=None):
    with pyro.plate("data", 500):  # <- right for the whole table only
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        return pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise_scale).to_event(1), obs=x)


message_of(lambda: fit(wrong_size, Exact(story), x, batch_size=128, steps=1, progress=False))

# %% [markdown]
# It works on the whole table, and breaks on the first minibatch: the model describes 500 rows,
# whatever it is given. `len(x)` is always right.
#
# ### Mistake 3: an operation that does not carry leading dimensions
#
# Here `z` has shape `(500, 2)`, so `z[:, 0]` is its first column. This is true until somebody asks
# for several draws at once. Pyro puts the new dimension on the *left*, and then `z` is
# `(draws, 500, 2)`:

# %%
with pyro.plate("draws", 3, dim=-2):
    trace = poutine.trace(story).get_trace(x)
trace.compute_log_prob()
print(trace.format_shapes())

# %% [markdown]
# `story` is fine with that: `z @ loading.mT` works on the last dimension and carries the others
# along. The next model counts dimensions from the left:


# %%
def counts_from_the_left(x=None, *, size=None):
    with pyro.plate("data", size if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        mean = loc + z[:, 0, None] * loading[:, 0] + z[:, 1, None] * loading[:, 1]  # <- z[:, 0]
        return pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)


print(site_table(counts_from_the_left, x))  # nothing to see: one draw is fine

# %%
message_of(
    lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss(
        counts_from_the_left, Exact(story), x
    )
)

# %% [markdown]
# How to read it: the first line is torch's, and names sizes only. The table below it is Pyro's, and
# lists what was done before it happened: site `z` was reached, with batch `3 500`, and `x` was not.
# So look at the lines between the two. We were lucky that the sizes clashed. If they had not, the
# numbers would be wrong without a word. So before its first step, `fit` compares several draws at
# once with the same draws one by one:

# %%
guide = Amortized(counts_from_the_left, hidden=())
message_of(
    lambda: fit(
        counts_from_the_left, guide, x, objective=ELBO(particles=3), steps=1, progress=False
    )
)

# %% [markdown]
# The cure is to count from the right, `z[..., 0, None]`, or to use operations that do: `@`,
# `sum(-1)`, `torch.einsum("...k,dk->...d", z, loading)`, `torch.cat(..., dim=-1)`.


# %%
def counts_from_the_right(x=None, *, size=None):
    with pyro.plate("data", size if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        mean = loc + z[..., 0, None] * loading[:, 0] + z[..., 1, None] * loading[:, 1]
        return pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)


with poutine.trace() as tracer, pyro.plate("draws", 3, dim=-2):
    counts_from_the_right(x)
tracer.trace.nodes["x"]["fn"].batch_shape

# %% [markdown]
# ### Local and global
#
# What if the plate is missing altogether? Again the model runs. The table shows it: `z` is now a
# *global* latent, one thing shared by the whole table, although its batch shape is `(500,)`.


# %%
def forgot_the_plate(x):
    z = pyro.sample("z", dist.Normal(loc.new_zeros(len(x), K), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(loc + z @ loading.mT, noise_scale).to_event(1), obs=x)


print(site_table(forgot_the_plate, x))
print()
message_of(lambda: Amortized(forgot_the_plate, example=x[:7]))

# %% [markdown]
# A global latent is right where something *is* shared by all rows: an unknown $W$ with a prior, for
# example. It is sampled outside the plate, with an empty batch shape. `bayesian` does that to the
# parameters of any model, here to those of the library's own PPCA:

# %%
print(site_table(bayesian(PPCA(data_dim=D, latent_dim=K), dist.Normal(0.0, 1.0)), x.cpu()))

# %% [markdown]
# ## The posterior
#
# We see $x_n$ and ask for $z_n$. For this model the answer, the *posterior*, has a closed form:
#
# $$p(z_n \mid x_n) = \mathcal{N}\!\left(\tfrac{1}{\sigma^2}\, C\, W^\top (x_n - \mu),\; C\right),
#   \qquad C = \left(I + \tfrac{1}{\sigma^2} W^\top W\right)^{-1}.$$
#
# In Pyro, a distribution over the latents is written as a second function, the *guide*. It takes the
# same arguments and samples the same latents, in a plate of the same name.


# %%
def posterior(x):
    precision = torch.eye(K).to(x) + loading.mT @ loading / noise_scale**2
    covariance = torch.linalg.inv(precision)
    return dist.MultivariateNormal((x - loc) @ loading @ covariance / noise_scale**2, covariance)


def exact_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", posterior(x))


print(site_table(exact_guide, x))

# %% [markdown]
# ### First check: the bound meets the evidence
#
# How good is a guide $q$? The *evidence lower bound* is
#
# $$\mathrm{ELBO} = \mathbb{E}_{q}\left[\log p(x, z) - \log q(z)\right]
#   = \log p(x) - \mathrm{KL}\left(q(z) \,\|\, p(z \mid x)\right) \le \log p(x).$$
#
# At the exact posterior the bound *is* $\log p(x)$. More than that: there
# $\log p(x, z) - \log q(z) = \log p(x)$ for every single $z$, since this is Bayes' rule. So one draw
# is enough, and chance plays no part. Here $\log p(x)$ is known too, because
# $x \sim \mathcal{N}(\mu, W W^\top + \sigma^2 I)$. A mistake in the model, in the guide or in the
# algebra breaks the equality.

# %%
covariance = loading @ loading.mT + noise_scale**2 * torch.eye(D, device=device)
log_evidence = dist.MultivariateNormal(loc, covariance).log_prob(x)  # one number a row

bound = elbo(story, exact_guide, x, particles=1, seed=0)
largest = (bound.rows - log_evidence).abs().max().item()
print(f"log p(x), closed form: {log_evidence.mean():.5f} nats per row")
print(f"ELBO, one draw:        {bound.mean:.5f}")
print(f"largest difference in any of the {len(x)} rows: {largest:.1e}")
assert largest < 1e-3

# %% [markdown]
# What remains is rounding. (*Nats* are the unit of natural logarithms. A difference of 0.01 nats per
# row means that one of two models makes each row about 1 % more probable.)
#
# Pyro's own bound agrees. It is called a loss, so the sign is turned, and it is a total over rows:

# %%
print(f"{-Trace_ELBO().loss(story, exact_guide, x) / len(x):.5f}")

# %% [markdown]
# You need not do the algebra yourself. `Exact` finds the posterior of any linear-Gaussian model, by
# completing the square with automatic differentiation. If the model is not of that kind, it says so.

# %%
exact = Exact(story)
difference = (exact.q("z", x).mean - posterior(x).mean).abs().max().item()
print(f"largest difference to our formula: {difference:.1e}")

# %% [markdown]
# And a bad guide? Take the prior, which ignores the data. The bound is lower, and it should be lower
# by exactly the KL divergence from the prior to the posterior, which has a closed form as well. Now
# chance does play a part, so the estimate comes with its standard error.


# %%
def lazy_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))


lazy = elbo(story, lazy_guide, x, particles=50 if SMOKE else 5000, seed=0)
prior = dist.MultivariateNormal(loc.new_zeros(K), torch.eye(K, device=device))
gap = log_evidence.mean().item() - lazy.mean
divergence = kl_divergence(prior, posterior(x)).mean().item()
print(f"log p(x) - ELBO:     {gap:.3f} +- {lazy.se:.3f} nats per row")
print(f"KL, closed form:     {divergence:.3f}")
assert abs(gap - divergence) < 5 * lazy.se

# %% [markdown]
# ### Second check: a sampler
#
# NUTS is a Markov chain Monte Carlo method. It knows nothing of guides: it takes the model, follows
# the gradient of $\log p(x, z)$, and draws from the posterior. It is slow, and it is independent,
# which makes it a good witness. Four rows will do. (`rows=True` says that each row is a target of its
# own.)

# %%
chosen = [6, 7, 9, 18]  # far apart, for the picture
few = x[chosen]
draws = sample(
    story,
    few,
    rows=True,
    chains=2 if SMOKE else 4,
    draws=10 if SMOKE else 250,
    warmup=20 if SMOKE else 150,
    seed=0,
    progress=False,
)
table = draws.summary()[["mean", "mcse", "sd", "ess_bulk", "r_hat"]]
table.insert(1, "exact mean", posterior(few).mean.flatten().cpu().numpy())
table.insert(4, "exact sd", posterior(few).stddev.flatten().cpu().numpy())
table.round(3)

# %% [markdown]
# Read the table like this. `mcse` is the Monte Carlo error of `mean`, so `mean` and `exact mean`
# should differ by a few of these at most. `ess_bulk` says how many independent draws the chains are
# worth. `r_hat` close to 1 says that the chains agree with each other.

# %%
errors = ((table["mean"] - table["exact mean"]) / table["mcse"]).abs()
ratios = table["sd"] / table["exact sd"]
print(f"largest error of a mean: {errors.max():.1f} Monte Carlo standard errors")
print(f"sd by NUTS / exact sd:   {ratios.min():.3f} to {ratios.max():.3f}")
if not SMOKE:
    assert errors.max() < 5
    assert (ratios - 1).abs().max() < 0.2

# %%
angle = np.linspace(0, 2 * np.pi, 100)
circle = 2 * np.stack([np.cos(angle), np.sin(angle)])
fig, ax = plt.subplots(figsize=(6, 3.6))
for row in range(len(few)):
    q = posterior(few[row])
    ellipse = q.mean.cpu().numpy()[:, None] + q.scale_tril.cpu().numpy() @ circle
    cloud = draws["z"][:, :, row].flatten(0, 1)[::4].cpu()
    color = f"C{row}"
    ax.scatter(cloud[:, 0], cloud[:, 1], s=3, alpha=0.5, color=color, linewidths=0)
    ax.plot(ellipse[0], ellipse[1], color=color, label=f"row {chosen[row]}")
    ax.plot(*truth.z[chosen[row]], "X", color=color, markeredgecolor="black")
ax.set(xlabel="$z_1$", ylabel="$z_2$", title="NUTS (dots), exact (2 sd), true z (crosses)")
ax.set_aspect("equal")
ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# The dots fill the ellipses, and the crosses are where such dots could be. The ellipses are narrow along $z_1$,
# because the first column of $W$ is twice as long as the second: more signal, less doubt.

# %% [markdown]
# ## Learning
#
# So far $W$, $\mu$ and $\sigma$ were given. To learn them, declare them as parameters. `pyro.param`
# takes a name and a starting value, and finds the current value by that name ever after. The story
# itself does not change.


# %%
def learner(x=None, *, size=None):
    loading = pyro.param("loading", lambda: torch.randn(D, K, device=device))
    loc = pyro.param("loc", lambda: torch.zeros(D, device=device))
    noise_scale = pyro.param(
        "noise_scale", lambda: torch.ones((), device=device), constraint=constraints.positive
    )
    with pyro.plate("data", size if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(loc.new_zeros(K), 1.0).to_event(1))
        mean = loc + z @ loading.mT
        return pyro.sample("x", dist.Normal(mean, noise_scale).to_event(1), obs=x)


# %% [markdown]
# `fit` climbs the bound by gradient ascent. Two things can stand where the guide stands:
#
# - `Exact(learner)`, the true posterior under the current parameters. The bound then equals the
#   likelihood at every step.
# - `Amortized(learner, hidden=())`, a small network, here a linear one, that reads $x_n$ and puts out
#   a mean and a scale for each element of $z_n$. It starts knowing nothing and learns along with the
#   model. This is the guide that scales to models without closed forms.
#
# And this is what they should reach. Maximum likelihood has a closed form here: the first K
# eigenvectors of the covariance matrix, rescaled. It is one call, and scikit-learn's `PCA.score` is
# an independent second opinion.

# %%
best = PPCA.maximum_likelihood(x, latent_dim=K)
maximum = best.log_evidence(x).mean().item()
pca = PCA(K).fit(x.cpu().numpy())
print(f"closed form:  {maximum:.5f} nats per row")
print(f"scikit-learn: {pca.score(x.cpu().numpy()):.5f}")

# %% [markdown]
# (They differ in the fifth decimal, because scikit-learn divides variances by N - 1 and maximum
# likelihood by N.)


# %%
def learnt():
    """Return the parameters as they are now, and the mean log-likelihood of the data."""
    values = {name: pyro.param(name).detach() for name in ("loading", "loc", "noise_scale")}
    loading, loc, noise_scale = values.values()
    covariance = loading @ loading.mT + noise_scale**2 * torch.eye(D, device=device)
    likelihood = dist.MultivariateNormal(loc, covariance).log_prob(x).mean().item()
    return loading.cpu().numpy(), likelihood


runs, loadings, likelihoods = {}, {}, {}
for name, make_guide, steps, lr in (
    ("Exact", lambda: Exact(learner), 400, 0.05),
    ("Amortized", lambda: Amortized(learner, hidden=()), 2000, 0.02),
):
    pyro.clear_param_store()  # start anew: pyro.param finds old values by name
    torch.manual_seed(0)
    steps = 20 if SMOKE else steps
    runs[name] = fit(
        learner,
        make_guide(),
        x,
        steps=steps,
        batch_size=len(x),
        lr=lr,
        schedule=lambda optimizer, steps=steps: CosineAnnealingLR(optimizer, steps),
        seed=0,
        progress=False,
    )
    loadings[name], likelihoods[name] = learnt()
    print(f"{name:9} log-likelihood {likelihoods[name]:.5f}, "
          f"{likelihoods[name] - maximum:+.1e} from the maximum")  # fmt: skip

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
for name, run in runs.items():
    gaps = (maximum - run.bounds).reshape(-1, 20).mean(1)  # 20 steps at a time: they are noisy
    ax.semilogy(20 * torch.arange(1, len(gaps) + 1), gaps, label=name)
ax.axhline(1e-3, color="gray", linestyle=":", label="0.001 nats per row")
ax.set(
    xlabel="step", ylabel="maximum - bound, nats per row", title="How far from the best possible"
)
ax.legend(frameon=False)
plt.show()

# %% [markdown]
# `Exact` needs fewer steps: each of its bounds is the likelihood itself, down to rounding.
# `Amortized` has a network to train as well, and estimates the bound from one draw for each row. So
# single bounds are noisy, and one of them may even come out above $\log p(x)$: the bound holds *on
# average*. The learning rate falls to zero along the way (`schedule`), so that the noise averages
# out in the parameters. What is left of its gap belongs to the guide: the likelihood of the model
# itself, printed above, is much nearer to the maximum than the bound is.
#
# ### What is learnt, and what is not
#
# Did both find what PCA finds? Compare the columns of $W$ with the principal axes. *Principal angles*
# compare the planes they span. The *cosines* compare column by column.

# %%
for name, learnt_loading in loadings.items():
    degrees = np.degrees(subspace_angles(learnt_loading, pca.components_.T))
    columns = learnt_loading / np.linalg.norm(learnt_loading, axis=0)
    cosines = np.abs(pca.components_ @ columns)
    print(f"{name}: angles between the planes {degrees.round(3)} degrees")
    print(f"  |cosine| of each principal axis (rows) and column of W:\n{cosines.round(3)}")

# %% [markdown]
# Both find the plane. Only `Amortized` finds the axes, up to their order. Why? Turn $W$ by any
# rotation $R$ and $W R (W R)^\top = W W^\top$: the likelihood does not change, so it cannot tell the
# axes. `Exact` keeps whatever rotation it started with. `Amortized` uses a normal with *independent*
# elements. It can match the posterior, and close the gap, only where the posterior covariance is
# diagonal, and that is where the columns of $W$ are orthogonal: the principal axes. A guide is never
# neutral. It changes which model you learn (Lucas et al., 2019, https://arxiv.org/abs/1911.02469).
#
# ## Minibatches
#
# With many rows, each step sees only some of them. The bound on 100 of 500 rows must then be
# multiplied by 5. That is easy to forget, and it matters as soon as there is a global latent, whose
# terms must *not* be multiplied. `minibatch` is an effect handler that does it. The model stays
# as it is.

# %%
batches = torch.arange(len(x)).split(100)
whole = -Trace_ELBO().loss(story, exact_guide, x)
parts = []
for index in batches:
    with minibatch(index, size=len(x)):
        parts.append(-Trace_ELBO().loss(story, exact_guide, x[index.to(device)]))

print(f"whole table:               {whole:.2f} nats")
print("five minibatches:          " + ", ".join(f"{part:.0f}" for part in parts))
print(f"their average:             {np.mean(parts):.2f}")
with minibatch(batches[0], size=len(x)), poutine.trace() as tracer:
    story(x[:100])
print(f"scale of sites z and x:    {[tracer.trace.nodes[name]['scale'] for name in 'zx']}")
assert abs(np.mean(parts) - whole) < 1e-4 * abs(whole)

# %% [markdown]
# Each minibatch gives another number, and their average is the whole. `fit(..., batch_size=100)`
# uses the handler for you, for the model and for the guide alike.
#
# ## The same thing, ready made
#
# You have seen `PPCA` above. It is `learner` in reusable form: its parameters live in the object,
# not in a global store, and each piece of the story is a method that you can call.

# %%
model = PPCA(data_dim=D, latent_dim=K).to(device)
print(site_table(model, x))
print()
print("guides that fit:", ", ".join(for_model(model).fitting))

# %%
with torch.no_grad():
    model.loading.copy_(loading)
    model.loc.copy_(loc)
    model.log_noise_scale.fill_(np.log(noise_scale))
same = (model.log_evidence(x) - log_evidence).abs().max().item()
print(f"log p(x) by model.log_evidence and by hand differ by {same:.1e} at most: rounding")
assert same < 1e-3

# %% [markdown]
# To end with something to look at: images of handwritten digits, 8 by 8 pixels, in minibatches.

# %%
digits = load("digits")
images = digits.x.to(device)
torch.manual_seed(0)
model = PPCA(data_dim=64, latent_dim=2, noise_scale=0.3).to(device)
guide = Exact(model)
epochs = 2 if SMOKE else 150
result = fit(
    model,
    guide,
    images,
    epochs=epochs,
    batch_size=128,
    lr=0.02,
    schedule=lambda optimizer: CosineAnnealingLR(optimizer, epochs * -(-len(images) // 128)),
    seed=0,
    progress=False,
)
reached = model.log_evidence(images).mean().item()
possible = PPCA.maximum_likelihood(images, latent_dim=2).log_evidence(images).mean().item()
print(f"by fit {reached:.4f}, closed form {possible:.4f} nats per row")
print(f"first minibatch {result.bounds[0]:.1f}, {result.steps} steps of {result.batch_size} rows")

# %%
z = encode(model, guide, digits.x_test)["z"].cpu()
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(1.15, 1))
dots = left.scatter(z[:, 0], z[:, 1], c=digits.y_test, cmap="tab10", vmin=-0.5, vmax=9.5, s=10)
fig.colorbar(dots, ax=left, ticks=range(10), label="digit")
left.set(xlabel="$z_1$", ylabel="$z_2$", title="Test images by their posterior means")

ticks = torch.linspace(-2, 2, 7)
grid = torch.stack(torch.meshgrid(ticks, ticks.flip(0), indexing="xy"), -1)
with torch.no_grad():
    means = model.likelihood(grid.to(device)).mean.reshape(7, 7, 8, 8).cpu()
framed = torch.nn.functional.pad(means, (1, 1, 1, 1))
right.imshow(
    framed.permute(0, 2, 1, 3).reshape(70, 70),
    cmap="gray_r",
    vmin=0,
    vmax=1,
    extent=(-2.33, 2.33, -2.33, 2.33),
)
right.set(xlabel="$z_1$", ylabel="$z_2$", title="What the model expects at each z")
fig.tight_layout()
plt.show()

# %% [markdown]
# Similar digits lie together although the model never saw a label. Two linear dimensions are not
# many for ten digits, and the overlap shows it. A nonlinear decoder does better: that is the
# variational autoencoder.
#
# ## When something is wrong
#
# 1. `print(site_table(model, x[:7]))`, with a number of rows that occurs nowhere else. Is each
#    latent local or global as you meant it? Is batch the plates, and event the rest?
# 2. `trace.compute_log_prob(); print(trace.format_shapes())`. Is each `log_prob` of the plates' shape?
# 3. `model(size=7)`. Do invented data look like data?
# 4. Is there a closed form, or a small case that has one? Compare. If not, compare with NUTS.
#
# The headline of this page, asserted: by gradient ascent both guides reach the best possible
# log-likelihood within 0.001 nats per row, and digits in minibatches within 0.01.

# %%
if SMOKE:  # too few steps to arrive, enough to be on the way
    assert all(run.bounds[-1] > run.bounds[0] for run in (*runs.values(), result))
else:
    assert all(abs(value - maximum) < 1e-3 for value in likelihoods.values())
    assert abs(reached - possible) < 1e-2
"all as promised"
