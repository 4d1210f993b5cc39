# %% [markdown]
# # 6. Why amortise?
#
# There is an obvious way to learn a model with latents: for each row find out what its latents may be,
# then move the parameters, and again. It is how EM works, and it is not how VAEs are trained. By the end
# you will have
#
# - fitted one model by variational EM, by Monte Carlo EM, by SVI with a network, and by its closed form:
#   four ways to one answer,
# - asked how sure the parameters are, by a guide and by NUTS,
# - seen what each of them costs as rows grow, and what a *new* row costs,
# - measured what the network loses, the *amortisation gap*, and got it back,
# - a rule when to use which.
#
# `benchmarks/amortisation.py` does this on MNIST with up to 60,000 rows;
# [the results](../benchmarks/results/amortisation.md) are with it.

# %%
import os
import statistics
import time

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import torch

from guides import Amortized, Local
from ppl_models import PPCA, VAE, bayesian
from ppl_models.data import load
from ppl_models.evaluate import elbo
from ppl_models.infer import MonteCarloE, VariationalE, expectation_maximization, fit, sample

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## Four ways to one answer
#
# Probabilistic PCA is the model on which all is known: $z_n \sim \mathcal{N}(0, I)$,
# $x_n \sim \mathcal{N}(W z_n + \mu, \sigma^2 I)$. Its likelihood has a maximum that linear algebra finds, so each
# algorithm can be scored by what it leaves: nats per row below that maximum.

# %%
torch.manual_seed(0)
x = PPCA(data_dim=8, latent_dim=2, noise_scale=0.5)(size=300).detach()
best = PPCA.maximum_likelihood(x, 2).log_evidence(x).mean().item()


def fresh():
    """The same start for all."""
    torch.manual_seed(1)
    return PPCA(data_dim=8, latent_dim=2)


def variational_em(model):
    """Each row has a mean and a scale of its own; gradient steps for them, then for W."""
    rounds = 2 if SMOKE else 250
    inner = VariationalE(Local(model, rows=len(x)), steps=10, lr=0.03)
    expectation_maximization(model, x, inner, iterations=rounds, lr=0.02, seed=0, progress=False)


def monte_carlo_em(model):
    """Each row's latents are sampled by NUTS; then the best parameters for these draws, at once."""
    expectation_maximization(
        model,
        x,
        MonteCarloE(chains=4, draws=8, warmup=10),
        m_step=PPCA.maximize,
        iterations=2 if SMOKE else 15,
        seed=0,
        progress=False,
    )


def amortised_svi(model):
    """A network, here a linear one, reads the row; all parameters move at once."""
    guide = Amortized(model, hidden=())
    epochs = 2 if SMOKE else 700
    fit(model, guide, x, epochs=epochs, batch_size=100, lr=0.01, seed=0, progress=False)


rows = {}
for name, algorithm in {
    "variational EM": variational_em,
    "Monte Carlo EM": monte_carlo_em,
    "amortised SVI": amortised_svi,
}.items():
    model = fresh()
    began = time.perf_counter()
    algorithm(model)
    seconds = time.perf_counter() - began
    left = best - model.log_evidence(x).mean().item()
    rows[name] = {"log p(x), nats a row": best - left, "below the maximum": left}
    print(f"{name}: {seconds:.1f} s")
rows["closed form"] = {"log p(x), nats a row": best, "below the maximum": 0.0}
same = pd.DataFrame(rows).T
same.round(4)

# %% [markdown]
# They agree to a few hundredths of a nat. What is left is the noise of draws and steps, but for one thing:
# the posterior of a row is a normal with correlations, and the guides of variational EM and of SVI are of
# independent latents. `PPCA` can turn its axes so that nothing is lost, and training finds that.
#
# Each of them ends with a point: the best parameters, and no word of how sure they are. Where that matters, make
# parameters latents with `bayesian`, and infer them along with the latents of the rows, by a guide or by NUTS. Here
# the mean $\mu$ alone, from the first 80 rows, with the other parameters as they are. Its posterior is known:
# scales of $\sqrt{\mathrm{diag}(W W^T + \sigma^2 I) / 80}$.

# %%
few = x[:80]
point = PPCA.maximum_likelihood(x, 2)


def prior(name, value):
    """A wide one for the mean; None leaves the others parameters."""
    return dist.Normal(torch.zeros_like(value), 10.0).to_event(1) if name == "loc" else None


unsure = bayesian(point, prior)
over_all = Amortized(unsure, hidden=())
fit(
    unsure,
    over_all,
    few,
    epochs=2 if SMOKE else 1000,
    batch_size=80,
    lr=0.02,
    seed=0,
    progress=False,
    fixed_model=True,
)
draws = 20 if SMOKE else 300
posterior = sample(unsure, few, draws=draws, warmup=draws, seed=0, progress=False)
with torch.no_grad():
    variance = point.loading.square().sum(1) + point.noise_scale**2
    scales = {
        "known": (variance / len(few)).sqrt(),
        "NUTS": posterior.scale()["loc"],
        "mean-field": over_all.q("loc").stddev,
    }
pd.DataFrame({name: value.numpy() for name, value in scales.items()}).T.round(3)

# %% [markdown]
# NUTS has it. The mean-field guide is far too sure: in its family the mean and the latents of the rows, which can
# make up for each other, are independent.
#
# ## What does it cost?
#
# Now a model whose posterior nobody knows: a VAE, on digits. The same two algorithms, for the same number of
# seconds.

# %%
digits = load("digits", binarize="threshold")
x, x_test = digits.x, digits.x_test
budget = 1.0 if SMOKE else 12.0  # seconds


def decoder():
    """The same start for both."""
    torch.manual_seed(0)
    return VAE(data_dim=64, latent_dim=8, hidden=(64,))


class Watch:
    """Looks at the clock, notes the bound of all rows now and then, and ends the training."""

    def __init__(self, model, guide):
        self.model, self.guide = model, guide
        self.seconds, self.bounds, self.spent = [], [], 0.0
        self.began = time.perf_counter()

    def __call__(self, step, _):
        now = time.perf_counter() - self.began - self.spent
        if not self.seconds or now > self.seconds[-1] + budget / 20:
            look = time.perf_counter()
            self.bounds.append(elbo(self.model, self.guide, x, particles=2, seed=0).mean)
            self.spent += time.perf_counter() - look  # looking is not training
            self.seconds.append(now)
        return now > budget


amortised = decoder()
network = Amortized(amortised, hidden=(64,))
quick = Watch(amortised, network)
fit(
    amortised,
    network,
    x,
    epochs=100_000,
    batch_size=64,
    lr=3e-3,
    seed=0,
    callbacks=[quick],
    progress=False,
)
iterative = decoder()
table = Local(iterative, rows=len(x))
slow = Watch(iterative, table)
result = expectation_maximization(
    iterative,
    x,
    VariationalE(table, steps=10, draws=1),
    iterations=100_000,
    steps=1,
    lr=0.01,
    seed=0,
    callbacks=[slow],
    progress=False,
)

# %%
fig, ax = plt.subplots(figsize=(6, 3.2))
ax.plot(quick.seconds, quick.bounds, label="amortised: a network reads the row")
ax.plot(slow.seconds, slow.bounds, label="iterative: numbers for each row")
ax.set(xlabel="seconds", ylabel="bound, nats per training row", ylim=(-45, None))
ax.legend()
plt.show()

# %% [markdown]
# The iterative algorithm spends ten steps on the latents of *all* rows before the parameters may move once,
# and what it learns about one row is of no use to the next. The network learns from each row how to read the
# others. With 60,000 rows instead of 1,437 a round of the one takes forty times as long, and the other has seen
# most of what it needs before its first pass ends.
#
# ## What does a new row cost?
#
# The network reads it, once. The iterative algorithm starts from scratch, in 500 steps.

# %%
passes = []
for _ in range(20):
    began = time.perf_counter()
    with torch.no_grad():
        network.q("z", x_test)
    passes.append(time.perf_counter() - began)
by_network = statistics.median(passes)
began = time.perf_counter()
refined = table.refine(x_test, steps=5 if SMOKE else 500, seed=0, progress=False)
by_steps = time.perf_counter() - began
ratio = by_steps / by_network
print(
    f"{len(x_test)} new rows: {1000 * by_network:.2f} ms by the network, {by_steps:.1f} s by steps"
)
print(f"by steps is more than {ratio // 100 * 100:.0f} times as long")

# %% [markdown]
# ## What does the network lose?
#
# A network with a few thousand numbers answers for every row there will ever be, and for none exactly. Give each
# row numbers of its own, start them at the network's answer, refine them, the model left as it is. What the bound
# gains is the amortisation gap.

# %%
own = network.local(x_test).refine(
    x_test, steps=5 if SMOKE else 500, lr=0.01, seed=0, progress=False
)
at_first = elbo(amortised, network, x_test, particles=200, seed=1)
after = elbo(amortised, own, x_test, particles=200, seed=1)
gap = after.rows - at_first.rows
error = gap.std().item() / len(gap) ** 0.5
print(f"network {at_first.mean:.2f}, refined {after.mean:.2f} nats")
print(f"amortisation gap {gap.mean():.2f} +- {error:.2f} nats per row")

# %%
fig, ax = plt.subplots(figsize=(6, 3))
ax.hist(gap.numpy(), bins=40)
ax.set(xlabel="gap of a test row, nats", ylabel="rows")
plt.show()

# %% [markdown]
# Most rows lose little, a few a lot: those unlike what the network was trained on. If these matter, refine: it is a
# call, and it starts from where the network is.
#
# ## To remember
#
# 1. All of these climb the same bound. On a model whose answer is known they reach it.
# 2. The iterative algorithms pay for each row in each round, and again for each new row. A network pays once.
# 3. It pays with a gap, which you can measure, `guide.local(x).refine(x)`, and remove where it matters.
# 4. Few rows, no new ones, or a posterior that must be as good as its family allows: iterate. From a thousand
#    images of MNIST a network learns them by heart, and ends far behind on new ones. Else: amortise, and refine
#    what is important.
# 5. Where the best parameters given the latents are known, Monte Carlo EM takes few rounds, and no family
#    has to be chosen.
#
# The headline of this page, asserted: three algorithms end within 0.05 nats of the closed form; NUTS knows how
# sure the mean is, a mean-field guide is too sure of it; in the same
# seconds the network gets a better bound; a new row costs at least a hundred times less; and the gap is there.

# %%
if not SMOKE:
    assert same["below the maximum"].max() < 0.05
    assert (scales["NUTS"] / scales["known"] - 1.0).abs().max() < 0.2
    assert (scales["mean-field"] < 0.9 * scales["known"]).all()
    assert quick.bounds[-1] > slow.bounds[-1]
    assert ratio > 100
    assert gap.mean().item() > 4 * error
"all as promised"
