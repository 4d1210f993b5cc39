# %% [markdown]
# # 9. Bayesian neural networks
#
# A trained network answers everything, and never says that it does not know. Make its weights latents
# and it does: each network that the data allow gives its answer, and where they disagree, nobody knows.
# By the end you will have
#
# - looked at what a prior over weights says of functions, before any data,
# - inferred the weights by a mean-field guide, "Bayes by Backprop", and by NUTS,
# - seen where the guide goes wrong: *between* two groups of data,
# - told apart noise that stays and doubt that more data remove,
# - scored and calibrated predictions on a real regression, and used a network of your own for classes.
#
# The guide is that of Blundell et al. (2015), https://arxiv.org/abs/1505.05424; its failure is described
# by Foong et al. (2020), https://arxiv.org/abs/1909.00719.
# [docs/models/bnn.md](../docs/models/bnn.md) has the details.

# %%
import math
import os

import matplotlib.pyplot as plt
import pandas as pd
import pyro.distributions as dist
import torch
from pyro import poutine
from sklearn.datasets import load_diabetes
from torch import nn

from guides import Local
from ppl_models import BayesianNeuralNetwork, render
from ppl_models.data import dataset, load
from ppl_models.evaluate import predict
from ppl_models.infer import ELBO, NUTS, Posterior, fit, sample
from ppl_models.parts.likelihoods import Classes, Homoscedastic

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## The story
#
# Draw all weights from a prior. Then, for each row, draw $y$ around what the network says of $x$.
#
# $$w \sim p(w), \qquad y_n \mid x_n, w \sim \mathcal{N}(f_w(x_n), \sigma^2)$$
#
# The weights are *global* latents: one set for all rows. The data are two groups on a sine, and nothing
# between them.

# %%
torch.manual_seed(0)


def truth(x):
    """What the data scatter around."""
    return 0.8 * torch.sin(3.0 * x[:, 0])


x = torch.cat([torch.empty(30, 1).uniform_(-1.5, -0.7), torch.empty(30, 1).uniform_(0.6, 1.4)])
y = truth(x) + 0.1 * torch.randn(60)
grid = torch.linspace(-2.0, 2.0, 161)[:, None]


def prior(name, value):
    """Wide at the inputs; at the output so that the sum over units keeps its scale."""
    scale = 3.0
    if name == "2.weight":
        scale = 3.0 / math.sqrt(value.shape[-1])
    return dist.Normal(torch.zeros_like(value), scale).to_event(value.ndim)


torch.manual_seed(1)
model = BayesianNeuralNetwork(1, hidden=(20,), likelihood=Homoscedastic(0.1), prior=prior)
guide = Local(model, example=(x, y))
render(model, guide, x, y)

# %% [markdown]
# ## What does the prior say?
#
# A prior over weights is a prior over functions, and nobody can read it off the weights. Draw some.

# %%
torch.manual_seed(2)
with torch.no_grad():
    functions = torch.stack([model.net(grid)[:, 0] for _ in range(30)])
fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(grid, functions.T, color="tab:blue", alpha=0.4, linewidth=1)
ax.plot(x, y, "k.", label="data")
ax.set(title="30 functions of the prior", xlabel="x", ylim=(-12, 12))
ax.legend()
plt.show()

# %% [markdown]
# They bend about as often as the data do, and are a good deal wider. Fine: the data may speak.
#
# ## Bayes by Backprop
#
# `Local` gives each global latent a family of its own, by default independent normals: mean-field. For a
# network one thing matters at the start. If all means are 0, hidden units differ by nothing but noise and
# stay alike; so place the means at weights as torch would draw them.

# %%
guide.start_around(model.net.starts(), scale=0.05)
steps = 20 if SMOKE else 4000
result = fit(
    model,
    guide,
    (x, y),
    objective=ELBO(8),  # eight draws of the weights in each step
    epochs=steps,
    batch_size=len(x),
    lr=5e-3,
    seed=0,
    progress=False,
)
print(f"bound {result.bounds[-200:].mean():.2f} nats per row, in {result.seconds:.0f} s")

# %% [markdown]
# ## NUTS
#
# The same model, no family at all: `sample` draws from the posterior itself. Chains start at draws of the
# guide, from where the way is short.

# %%
posterior = sample(
    model,
    x,
    y,
    sampler=NUTS(max_depth=4 if SMOKE else 8),
    init=guide,
    chains=4,
    draws=20 if SMOKE else 400,
    warmup=20 if SMOKE else 400,
    seed=0,
    progress=False,
)


def outputs(posterior, x):
    """What the network says of each row in each draw, shape (chains, draws, rows)."""
    # A network for each draw; the 1 stands for the rows, which share it.
    weights = {name: posterior[name].flatten(0, 1).unsqueeze(1) for name in model.net.starts()}
    with torch.no_grad(), poutine.condition(data=weights):
        said = model.net(x.to(posterior["0.weight"]))[..., 0]
    return Posterior({"f": said.reshape(posterior.chains, posterior.draws, len(x))})


of_weights = max(value.max().item() for value in posterior.rhat().values())
of_outputs = outputs(posterior, x).rhat()["f"].max().item()
print(f"R-hat of weights {of_weights:.2f}, of what the network says of the data {of_outputs:.3f}")

# %% [markdown]
# The R-hat of the weights is terrible, that of the outputs is good. Both are right. Swap two hidden units and
# the function is the same: there are $20! \cdot 2^{20}$ equal modes, and no chain will ever see them all. What
# you ask of a network are its outputs, so ask the diagnostics about those.
#
# ## Between the groups
#
# `predict` takes a guide or a posterior. It splits the variance of a new $y$ in two: what is left when the
# weights are known, *aleatoric*, and how much the networks disagree, *epistemic*.

# %%
draws = 100 if SMOKE else 1000
found = {
    "mean-field guide": predict(model, guide, grid, draws=draws, seed=0),
    "NUTS": predict(model, posterior, grid, draws=draws, seed=0),
}
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
for ax, (name, one) in zip(axes, found.items(), strict=True):
    for width, shade in ((2.0, 0.2), (1.0, 0.35)):
        low, high = one.mean - width * one.epistemic, one.mean + width * one.epistemic
        ax.fill_between(grid[:, 0], low, high, color="tab:blue", alpha=shade, linewidth=0)
    ax.plot(grid, one.mean, color="tab:blue", label="mean, 1 and 2 epistemic scales")
    ax.plot(grid, truth(grid), "k--", linewidth=1, label="truth")
    ax.plot(x, y, "k.")
    ax.set(title=name, xlabel="x", ylim=(-3, 3))
axes[0].legend(loc="upper left")
plt.show()

# %%
places = {"at the data": (0.6, 1.4), "between": (-0.3, 0.3), "beyond": (1.7, 2.0)}
table = pd.DataFrame(
    {
        name: {
            where: one.epistemic[(grid[:, 0] >= low) & (grid[:, 0] <= high)].mean().item()
            for where, (low, high) in places.items()
        }
        for name, one in found.items()
    }
)
table.round(3)

# %% [markdown]
# NUTS is sure at the data and lets go between them, by a factor of about twenty. The mean-field guide does
# neither: it is too unsure where it has seen data, and too sure where it has not. The posterior holds because
# weights lean on each other; independent weights that have to be right at the data cannot all be free between
# them. No longer training mends this: it is the family.
#
# So is a mean-field guide worthless? Not for what most people ask: predictions where data are.
#
# ## A real regression
#
# 442 diabetes patients, ten measures of each, and how far the disease went in a year. `dataset` holds out a
# fifth, and brings columns and target to mean 0 and scale 1. This time the scale of the noise is
# inferred with the weights, under the default `Homoscedastic()`, and the weights have the default prior.

# %%
measures, progression = load_diabetes(return_X_y=True)
patients = dataset(measures, y=progression, standardize=True, name="diabetes")
torch.manual_seed(3)
regression = BayesianNeuralNetwork(10, hidden=(50,))
of_regression = Local(regression, example=(patients.x, patients.y))
of_regression.start_around(regression.net.starts(), scale=0.05)
fit(
    regression,
    of_regression,
    (patients.x, patients.y),
    objective=ELBO(10),
    epochs=2 if SMOKE else 300,
    batch_size=32,
    lr=3e-3,
    seed=0,
    progress=False,
)
test = predict(regression, of_regression, patients.x_test, patients.y_test, draws=draws, seed=0)
rmse = (test.mean - patients.y_test).square().mean().sqrt().item()
constant = patients.y_test.square().mean().sqrt().item()
print(f"log density {test.log_density}; RMSE {rmse:.3f}, predicting the mean {constant:.3f}")
print(f"aleatoric scale {test.aleatoric.mean():.3f}, epistemic {test.epistemic.mean():.3f}")
test.plot()

# %% [markdown]
# The picture asks: of the test targets, how many fall below the 10 % quantile of their prediction, below the
# 20 % quantile, and so on? Calibrated predictions follow the diagonal, within the band.
#
# ## Classes, and a network of your own
#
# Any `torch.nn.Module` goes in: `net=`. Here is a small convolutional one for digits, with `Classes(10)`. What
# does it say of images that are no digits?

# %%
digits = load("digits")
images, labels = digits.x.reshape(-1, 1, 8, 8), digits.y
torch.manual_seed(4)
net = nn.Sequential(
    nn.Conv2d(1, 8, kernel_size=3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(128, 10),
)
reader = BayesianNeuralNetwork((1, 8, 8), net=net, likelihood=Classes(10))
over_reader = Local(reader, example=(images, labels))
over_reader.start_around(reader.net.starts(), scale=0.03)
fit(
    reader,
    over_reader,
    (images, labels),
    epochs=1 if SMOKE else 40,
    batch_size=128,
    lr=3e-3,
    seed=0,
    progress=False,
)

# %%
test_images = digits.x_test.reshape(-1, 1, 8, 8)
torch.manual_seed(5)
pixels = images.flatten()[torch.randint(images.numel(), (len(test_images), 1, 8, 8))]
told = {
    "test images": predict(reader, over_reader, test_images, digits.y_test, draws=draws, seed=0),
    "pixels at random": predict(reader, over_reader, pixels, draws=draws, seed=0),
}
accuracy = (told["test images"].mean.argmax(-1) == digits.y_test).double().mean().item()
print(f"accuracy {accuracy:.1%}, log density {told['test images'].log_density}")
confident = {name: one.mean.amax(-1).mean().item() for name, one in told.items()}
epistemic = {name: one.epistemic.amax(-1).mean().item() for name, one in told.items()}
pd.DataFrame({"probability of the best class": confident, "epistemic scale": epistemic}).round(3)

# %% [markdown]
# On pixels at random the draws of the weights disagree, and their mean is unsure: what a single network of these
# would not have told.
#
# ## To remember
#
# 1. Look at functions of the prior before you believe in one over weights.
# 2. `start_around(model.net.starts())`, or hidden units stay alike.
# 3. Trust R-hat of outputs, not of weights: those have too many equal modes.
# 4. Mean-field is fine where data are. Between groups of data it is too sure: compare with NUTS.
# 5. Epistemic doubt goes with more data, aleatoric noise stays. Score held-out targets, and look at the
#    calibration.
#
# The headline of this page, asserted: between the groups NUTS is less sure than the guide, at the data more so;
# its outputs have converged; of the patients it knows more than the mean, most of the doubt about them is aleatoric,
# and their targets fall within the band of calibration; nine in ten digits are read, and noise with less confidence.

# %%
if not SMOKE:
    assert table.loc["between", "NUTS"] > 1.4 * table.loc["between", "mean-field guide"]
    assert table.loc["at the data", "NUTS"] < 0.7 * table.loc["at the data", "mean-field guide"]
    assert of_outputs < 1.05 < of_weights
    assert rmse < 0.85 * constant
    assert (test.aleatoric > test.epistemic).all()
    assert (test.levels.sort().values - torch.linspace(0, 1, len(test.levels))).abs().max() < 0.15
    assert accuracy > 0.9
    assert confident["pixels at random"] < confident["test images"] - 0.1
"all as promised"
