# %% [markdown]
# # 13. Deep exponential families
#
# A document is about a few topics, and a topic uses a few words; a picture has a few parts, and a part
# covers a few pixels. So let the latents be *amounts*: positive, and most of them next to nothing. That
# is the sparse gamma deep exponential family (Ranganath, Tang, Charlin & Blei, 2015,
# https://arxiv.org/abs/1411.2581). By the end you will have
#
# - seen what a gamma variable of shape 0.1 is like, and where single precision ends,
# - held the bound against a $\log p(x)$ that is known,
# - trained two layers on digits as counts, by path and by score, with two families of guides,
# - looked at the parts that digits are made of,
# - found topics that were hidden in simulated documents, and scored held-out words.
#
# [docs/models/deep_exponential_family.md](../docs/models/deep_exponential_family.md) has the details.

# %%
import os
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import torch

from guides import Local, families
from guides.base import key
from guides.deep_exponential_family import start_near
from ppl_models import DeepExponentialFamily, explain, render
from ppl_models.data import load
from ppl_models.evaluate import elbo, encode, halves, perplexity, reconstruct, unigram_perplexity
from ppl_models.infer import ELBO, fit
from ppl_models.infer.gradients import RunningAverage

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## The story
#
# Weights between layers, then for each row the top layer, the layer below it, and the counts:
#
# $$w_1, w_0 \sim \mathrm{Gamma}(.1, .3), \qquad z_2 \sim \mathrm{Gamma}(.1, .1), \qquad
#   z_1 \mid z_2 \sim \mathrm{Gamma}\Bigl(.1, \frac{.1}{z_2 w_1}\Bigr), \qquad
#   x \mid z_1 \sim \mathrm{Poisson}(z_1 w_0).$$
#
# The second parameter is a rate, so the mean of $z_1$ is $z_2 w_1$: an amount in the upper layer brings
# amounts to the lower one. Weights are latents as well, the same for all rows: outside of the plate.
#
# The data are handwritten digits, with their 17 levels of ink as counts.

# %%
digits = load("digits")
x, x_test = ((part * 16).round() for part in (digits.x, digits.x_test))
units = (6, 3) if SMOKE else (24, 8)  # from the data upwards
model = DeepExponentialFamily(data_dim=64, latent_dims=units)
render(model, None, x[:7])

# %%
print(explain(model, x[:7]))

# %% [markdown]
# ## A gamma variable of shape 0.1
#
# Its mean may be 1, but most of its mass is next to 0. On the scale of logarithms it falls slowly to the
# left: its tail has slope 0.1.

# %%
torch.manual_seed(0)
draws = dist.Gamma(0.1, 0.1).sample((200_000,)).double()
grid = torch.linspace(-60, 5, 400).double()
fig, ax = plt.subplots(figsize=(7, 3))
ax.hist(draws.log10().numpy(), bins=100, density=True, color="lightgrey")
prior = dist.Gamma(torch.tensor(0.1).double(), 0.1)
scale = torch.log(torch.tensor(10.0)).double()
density = (prior.log_prob((grid * scale).exp()) + grid * scale).exp() * scale
ax.plot(grid, density)
ax.set(xlabel="log10 z", xlim=(-45, 4), title="Gamma(0.1, 0.1): half of it is below 0.01")
plt.show()
print(f"mean {draws.mean():.2f}, median {draws.median():.1e}, below 1e-30: {(draws < 1e-30).sum()}")

# %% [markdown]
# Single precision ends at $10^{-38}$. About one draw in 6,000 would be below; torch keeps it there, and the
# model keeps its rates off 0 by the same number. A guide could make a false bound of that, with
# concentrations so small that all its draws are kept there: `families.Gamma` has a least one, 0.05. In double
# precision, which NUTS uses, nothing of it is met.
#
# ## Where the truth is known
#
# One unit with weights that are known: the sum of a row is negative binomial, and the posterior is
# $\mathrm{Gamma}(\alpha + \sum_d x_d, \alpha + \sum_d w_d)$. With that for a guide, every single draw must give
# $\log p(x)$ itself:

# %%
one = DeepExponentialFamily(3, (1,), latent_weights=False, shape=0.4).double()
w = torch.tensor([[0.5, 2.0, 1.0]]).double()
with torch.no_grad():
    one.free_weights["0"].copy_(w.log())
few = torch.tensor([[0.0, 0.0, 0.0], [1.0, 3.0, 0.0], [7.0, 20.0, 11.0]]).double()
posterior = Local(one, rows=3, family=families.Gamma(min_concentration=0.0))
with torch.no_grad():
    numbers = [0.4 + few.sum(1), (0.4 + w.sum()).expand(3)]
    posterior.row_parameters[key("z1")].copy_(torch.stack(numbers, 1).log())

total = few.sum(1)
odds = (w.sum() / (0.4 + w.sum())).expand(3)
truth = dist.NegativeBinomial(0.4, probs=odds).log_prob(total)
shares = (w / w.sum()).log()
truth += torch.lgamma(total + 1) - torch.lgamma(few + 1).sum(1) + (few * shares).sum(1)
bound = elbo(one, posterior, few, particles=3, seed=0)
table = pd.DataFrame({"log p(x)": truth, "ELBO": bound.rows, "s.e.": bound.rows_se}).round(6)
print(table)

# %% [markdown]
# ## By path, and by score
#
# The guide: free parameters for each row, and for the weights; a gamma variable for each latent. Its draws
# carry a gradient, though no formula turns uniform numbers into gamma ones: *implicit* differentiation
# of the distribution function gives it. Before that was known, this model was trained by score.
#
# Where to start matters. From $\mathrm{Gamma}(1, 1)$ everywhere rates are those of nothing in particular.
# `start_near` puts them near the mean image, and every unit a little away from the others.

# %%
sites = ("w0", "w1", "z1", "z2")


def pair(family, near=True, units=units):
    """A model and a guide, always from the same start."""
    torch.manual_seed(0)
    model = DeepExponentialFamily(data_dim=64, latent_dims=units)
    own = sites if len(units) == 2 else ("w0", "z1")
    guide = Local(model, rows=len(x), family=dict.fromkeys(own, family))
    return model, start_near(guide, x, seed=0) if near else guide


steps = 10 if SMOKE else 1000
schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
training = {"steps": steps, "batch_size": len(x), "schedule": schedule, "progress": False}
by_score = ELBO(score=RunningAverage(everywhere=True))
runs = {
    "path, gamma": (families.Gamma(), True, ELBO(), 0.1),
    "path, gamma, blind start": (families.Gamma(), False, ELBO(), 0.1),
    "path, log-normal": (families.Normal(), True, ELBO(), 0.05),
    "score, gamma": (families.Gamma(), True, by_score, 0.01),
}
found, rows = {}, {}
fig, ax = plt.subplots(figsize=(7.5, 4))
for name, (family, near, objective, lr) in runs.items():
    found[name] = pair(family, near)
    result = fit(*found[name], x, objective=objective, lr=lr, seed=0, **training)
    ax.plot(result.bounds, label=name)
    end = elbo(*found[name], x, particles=3 if SMOKE else 20, seed=1)
    rows[name] = {"ELBO": end.mean, "s.e.": end.se, "lr": lr, "seconds": result.seconds}
ax.set(xlabel="step", ylabel="bound, nats per row", ylim=(-420, -120), title="One model, four ways")
ax.legend(frameon=False)
plt.show()
ways = pd.DataFrame(rows).T.round(2)
ways

# %% [markdown]
# The score function, without the terms that cannot depend on a draw, less a running mean, and at a rate ten
# times smaller, hardly leaves its start: it learns of thousands of latents by the cost of one draw. The path
# tells each latent which way to go. Gamma guides end above log-normal ones, whose tails are those of
# another distribution, and the blind start is made up for, but slowly.
#
# ## One layer or two?
#
# The bound includes the weights and the amounts of all layers, so it can say whether a layer pays.

# %%
single = pair(families.Gamma(), units=units[:1])
fit(*single, x, lr=0.1, seed=0, **training)
flat = elbo(*single, x, particles=3 if SMOKE else 20, seed=1)
deep = rows["path, gamma"]
print(f"one layer   {flat.mean:.2f} +- {flat.se:.2f} nats per row")
print(f"two layers  {deep['ELBO']:.2f} +- {deep['s.e.']:.2f} nats per row")

# %% [markdown]
# Here it does not: by this bound one layer is ahead. That need not be the model's fault. The guide takes all
# latents as independent, and of two layers that explain each other that is further from the truth; a bound
# pays for it. The upper layer is still of use for looking at what goes together.
#
# ## What digits are made of
#
# The weights of a unit next to the data are a picture of a part. Largest first, by how much ink each
# brings to all rows.

# %%
model, guide = found["path, gamma"]
with torch.no_grad():
    w0, w1 = guide.q("w0").mean, guide.q("w1").mean
    z1 = encode(model, guide, x, draws=20, seed=0)["z1"]
ink = z1.sum(0) * w0.sum(1)
order = ink.argsort(descending=True)


def show(pictures, titles, title):
    """Draw pictures of positive numbers in rows of twelve."""
    lines = -(-len(pictures) // 12)
    fig, axes = plt.subplots(lines, 12, figsize=(10, 1.1 * lines + 0.5), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, text in zip(axes.flat, pictures, titles, strict=False):
        ax.imshow(picture.view(8, 8), cmap="Greys", vmin=0.0)
        ax.set_title(text, fontsize=8)
    fig.suptitle(title, fontsize=10)
    plt.show()


share = ink / ink.sum()
show(w0[order], [f"{share[i]:.1%}" for i in order], "parts, and their share of all ink")

# %% [markdown]
# A row is a sum of few of them. How few? And what do the upper units bring together?

# %%
with torch.no_grad():
    used = z1 * w0.sum(1)
    top = used.sort(1, descending=True).values
    most = (top.cumsum(1) < 0.9 * top.sum(1, keepdim=True)).sum(1).double() + 1
print(f"parts that make 90 % of the ink of a digit: {most.mean():.1f} of {units[0]}")
show(w1 @ w0, [str(i) for i in range(units[1])], "what an upper unit brings, part by part")

# %%
with torch.no_grad():
    again = reconstruct(model, guide, x, draws=20, seed=0)["x"]
picks = [int((digits.y == digit).nonzero()[0]) for digit in range(10)]
show(
    torch.cat([x[picks], x[:2], again[picks], again[:2]]),
    [*digits.y[picks].tolist(), *digits.y[:2].tolist(), *[""] * 12],
    "digits, and below what the model makes of them",
)

# %% [markdown]
# ## Topics
#
# The same model reads texts: columns are words, and the units next to the data are topics. Here are
# documents whose topics we know: 25 words in a square, and a topic is a line or a column of it, so
# every word is in two of ten topics.

# %%
torch.manual_seed(1)
square = torch.arange(25).view(5, 5)
words = [f"{line}{column}" for line in "abcde" for column in "12345"]
topics = torch.zeros(10, 25)
for i, places in enumerate([*square, *square.T]):
    topics[i, places] = 1 / 5
amounts = dist.Gamma(0.2, 0.2).sample((600, 10)) * 8
documents = torch.poisson(amounts @ topics)
train, test = documents[:500], documents[500:]

reader = DeepExponentialFamily(data_dim=25, latent_dims=(10,))
gamma = dict.fromkeys(("w0", "z1"), families.Gamma())
guide = start_near(Local(reader, rows=500, family=gamma), train, seed=0)
fit(reader, guide, train, lr=0.1, seed=0, **training | {"batch_size": 500})
for line in reader.top_words(words, 5, weights=guide.q("w0").mean):
    print(*sorted(line))

# %% [markdown]
# Each line of the square and each column of it is there, in no order: that of units means nothing.
#
# **Held-out words.** One half of each test document tells what it is about, the other half is scored:
# $\exp$ of the mean of $-\log p(\text{word})$. A perplexity of 25 is what knowing nothing gives; frequencies
# of words are the *unigram*. Nobody can be below the perplexity of the true topics with the true amounts.

# %%
first, second = halves(test, seed=0)
refining = {"steps": 10 if SMOKE else 300, "lr": 0.1, "progress": False}
score = perplexity(reader, guide, first, second, seed=0, **refining)
true = amounts[500:] @ topics
ideal = (-torch.xlogy(second, true / true.sum(1, keepdim=True)).sum() / second.sum()).exp().item()
unigram = unigram_perplexity(train, second)
print(f"unigram           {unigram:.2f}")
print(f"model             {score}")
print(f"the true amounts  {ideal:.2f}")

# %% [markdown]
# On texts, `load("newsgroups")` and `load("reuters")` bring the vocabulary along; the benchmark
# `benchmarks/deep_exponential_family.py` has their perplexities.
#
# ## To remember
#
# 1. Amounts instead of switches or coordinates: parts can be read.
# 2. Where a draw has a path, take it: the score sees all latents by one number.
# 3. Sparse layers want gamma guides, and a start that knows the means of the data.
# 4. Judge topics by held-out words, against the unigram.
#
# The headline of this page, asserted: the exact posterior gives $\log p(x)$ at every draw; the path is far
# ahead of the score; and the model reads better than the unigram.

# %%
assert float((bound.rows - truth).abs().max()) < 1e-10
assert score.value > 1.0
if not SMOKE:
    assert rows["path, gamma"]["ELBO"] > rows["score, gamma"]["ELBO"] + 50
    assert ideal < score.value < 0.7 * unigram
