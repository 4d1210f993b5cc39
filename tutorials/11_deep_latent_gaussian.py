# %% [markdown]
# # 11. Deep latent Gaussian models
#
# One layer of normal latents makes a VAE. Put another layer above it, and one above that: causes of
# causes. It is the natural thing to do, and it has a catch: layers tend to switch off. By the end
# you will have
#
# - checked a deep model with linear layers against the one normal distribution that it is,
# - measured, in nats, what each layer is told about a row,
# - seen a guide that switches its layers off, and what wakes them,
# - compared three guides on the same two layers, and two layers with one,
# - drawn what the upper layer decides, and what it leaves to the lower one.
#
# The model is that of Rezende, Mohamed & Wierstra (2014), https://arxiv.org/abs/1401.4082.
# [docs/models/dlgm.md](../docs/models/dlgm.md) has the details.

# %%
import os

import matplotlib.pyplot as plt
import pandas as pd
import torch
from pyro import poutine

from guides import Amortized, Exact, Ladder
from ppl_models import DeepLatentGaussian, render
from ppl_models.data import load
from ppl_models.evaluate import elbo, log_evidence
from ppl_models.infer import ELBO, fit

SMOKE = bool(os.environ.get("SMOKE"))  # a few steps only, to see that everything runs
plt.rcParams["figure.dpi"] = 60
torch.set_num_threads(1)  # arrays this small gain nothing from more

# %% [markdown]
# ## The story
#
# From the top: draw $z_2$ from a standard normal. Draw $z_1$ around a function of $z_2$, with a scale of
# its own for each unit. Draw the pixels given a function of $z_1$.
#
# $$z_2 \sim \mathcal{N}(0, I), \qquad z_1 \mid z_2 \sim \mathcal{N}(T_1(z_2), \mathrm{diag}(s_1^2)),
#   \qquad x \mid z_1 \sim \mathrm{Bernoulli}(\sigma(T_0(z_1)))$$
#
# $T_1$ and $T_0$ are tanh networks.

# %%
digits = load("digits", binarize="threshold")
x_test = digits.x_test
layers = (16, 8)  # from the data upwards


def deep(layers=layers):
    """A new model, always from the same start."""
    torch.manual_seed(0)
    return DeepLatentGaussian(data_dim=64, latent_dims=layers, hidden=(64,))


model = deep()
render(model, Ladder(model, hidden=(64,)), x_test[:7])

# %% [markdown]
# ## Linear layers are one normal
#
# Before we trust deep layers, shallow ones: with linear functions and normal noise,
# $x = W_0 z_1 + b_0 + \epsilon$ and $z_1 = W_1 z_2 + b_1 + \ldots$, the data are normal again. Their mean
# and covariance follow by hand, and so does $\log p(x)$. `Exact` finds the joint posterior of both layers
# by completing the square, and then every draw of the bound must be that very number.

# %%
torch.manual_seed(1)
linear = DeepLatentGaussian(5, (3, 2), hidden=(), noise_scale=0.5).double()
(w0, b0), (w1, b1) = ((layer.net[0].weight, layer.net[0].bias) for layer in linear.layers)
x = linear(size=4).detach()
with torch.no_grad():
    of_z1 = w1 @ w1.T + torch.diag(linear.log_scales[0].exp() ** 2)
    of_x = w0 @ of_z1 @ w0.T + 0.25 * torch.eye(5)
    by_hand = torch.distributions.MultivariateNormal(w0 @ b1 + b0, of_x).log_prob(x)
by_bound = elbo(linear, Exact(linear), x, particles=2, seed=0).rows
print(torch.stack([by_hand, by_bound]))
assert torch.allclose(by_hand, by_bound, atol=1e-5)

# %% [markdown]
# ## Three guides
#
# All read the row by a network. They differ in how they put the two layers together.
#
# - **bottom up**: $z_1$ from the row, then $z_2$ from the row and $z_1$.
# - **top down**: $z_2$ from the row, then $z_1$ from the row and $z_2$: the order of the model.
# - **ladder** (Sønderby et al., 2016, https://arxiv.org/abs/1602.02282): top down as well, and it takes
#   $p(z_1 \mid z_2)$ from the model. What the row says of $z_1$ is a normal, what $z_2$ says is another,
#   and the guide is their product.
#
# The ladder needs to learn only what the row adds to the prior. That is also how it can go wrong.

# %%
guides = {
    "bottom up": lambda model: Amortized(model, hidden=(64,), bottom_up=True),
    "top down": lambda model: Amortized(model, hidden=(64,)),
    "ladder": lambda model: Ladder(model, hidden=(64,)),
}
epochs = 1 if SMOKE else 100
steps = -(-len(digits.x) // 64) * epochs


def trained(make, layers=layers, warm_up=0.0):
    """A pair, after the same training for all; the terms of latents rise to full weight."""
    model = deep(layers)
    torch.manual_seed(0)
    guide = make(model)
    weight = torch.tensor(0.0 if warm_up else 1.0)

    def rise(step, bound):
        if warm_up:
            weight.fill_(min(1.0, step / (warm_up * steps)))

    result = fit(
        model,
        guide,
        digits.x,
        objective=ELBO(kl_weight=weight),
        epochs=epochs,
        batch_size=64,
        lr=3e-3,
        seed=0,
        callbacks=[rise],
        progress=False,
    )
    return model, guide, result


# %% [markdown]
# How much does a layer know of a row? What the bound pays for it: $\log q - \log p$ of its draw, in nats,
# in the mean. A layer that is drawn from its prior costs nothing, and tells nothing.


# %%
def nats_by_layer(model, guide, draws=20):
    """The mean of log q - log p of each layer, per row."""
    found = {}
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(draws):
            guided = poutine.trace(guide).get_trace(x_test)
            told = poutine.trace(poutine.replay(model, trace=guided)).get_trace(x_test)
            guided.compute_log_prob()
            told.compute_log_prob()
            for level in range(1, len(model.latent_dims) + 1):
                name = f"z{level}"
                gap = guided.nodes[name]["log_prob"] - told.nodes[name]["log_prob"]
                found[f"nats in {name}"] = found.get(f"nats in {name}", 0.0) + gap.mean() / draws
    return {name: value.item() for name, value in found.items()}


def scores(model, guide):
    """What a trained pair is worth on test rows."""
    bound = elbo(model, guide, x_test, particles=50, seed=0)
    evidence = log_evidence(model, guide, x_test, particles=500, seed=1)
    return {"ELBO": bound.mean, "log p(x)": evidence.mean, **nats_by_layer(model, guide)}


pairs = {name: trained(make) for name, make in guides.items()}
without = pd.DataFrame({name: scores(*pair[:2]) for name, pair in pairs.items()}).T
without.round(2)

# %% [markdown]
# The ladder has all but switched off: nothing in the lower layer, less than a nat in the upper one, and a
# bound that is five nats behind. At the start the decoder makes nothing of the latents, and the bound pays
# for each nat that they are told. The cheapest guide is the prior, and the ladder has the prior at hand.
# The others have to find it, and learn something useful on the way.
#
# ## Warm-up
#
# So let the nats be free at first: `ELBO(kl_weight=w)` weighs the terms of latents, and a callback raises
# `w` from 0 to 1 in the first half of the training. What is reported, as ever, is the bound itself.

# %%
warm = {name: trained(make, warm_up=0.5) for name, make in guides.items()}
with_it = pd.DataFrame({name: scores(*pair[:2]) for name, pair in warm.items()}).T
with_it.round(2)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for ax, (title, found) in zip(
    axes, {"no warm-up": pairs, "warm-up in the first half": warm}.items(), strict=True
):
    for name, (_, _, result) in found.items():
        running = pd.Series(result.bounds.numpy()).rolling(200, min_periods=1).mean()
        ax.plot(running, label=name)
    ax.set(title=title, xlabel="step", ylim=(-40, -15))
axes[0].set_ylabel("bound, nats per row")
axes[0].legend()
plt.show()

# %% [markdown]
# The ladder gains more than five nats, and now has the best bound of the three. The bottom-up guide gains
# a little; the top-down one, which must guess $z_2$ from the row without the model's help, does not.
#
# Look at the split. Bottom up, both layers hold nats. The ladder tells the row to $z_2$ alone, and draws
# $z_1$ as the model would: noise on the way to the pixels, no cause of its own. The bounds are alike, the
# stories are not: which layer knows what is a matter of the guide as much as of the model.
#
# ## One layer or two?
#
# The same training with the lower layer alone. (A fair comparison is by $\log p(x)$, which both are scored
# on, and by the same number of steps.)

# %%
alone = trained(guides["bottom up"], layers=(16,), warm_up=0.5)
both = {"one layer": scores(*alone[:2]), "two layers": with_it.loc["bottom up"].to_dict()}
pd.DataFrame(both).T.round(2)

# %% [markdown]
# ## What does the upper layer decide?
#
# Draw $z_2$ once for each line of the picture, and then seven times what is below it. What is alike in a
# line was decided at the top.

# %%
model, guide, _ = warm["ladder"]
torch.manual_seed(3)
with torch.no_grad():
    top = model.prior().sample((7, 1)).expand(7, 7, -1)
    below = model.conditional(1, top).sample()
    pixels = model.likelihood(below).base_dist.mean
fig, axes = plt.subplots(7, 7, figsize=(5, 5))
for ax, image in zip(axes.flat, pixels.reshape(49, 8, 8), strict=True):
    ax.imshow(image, cmap="gray_r", vmin=0, vmax=1)
    ax.set_axis_off()
plt.show()
spread = pixels.var(1).mean().item() / pixels.reshape(49, 64).var(0).mean().item()
print(f"of the variance of pixels, {1 - spread:.0%} is decided by the upper layer")

# %% [markdown]
# ## To remember
#
# 1. A layer that costs no nats knows nothing. Look at the nats of each layer, not only at the bound.
# 2. Layers switch off early in training, when their nats buy nothing yet. Warm up with
#    `ELBO(kl_weight=...)`.
# 3. A guide that knows the prior, such as `Ladder`, is the one that most needs it.
# 4. Alike bounds do not mean alike layers. Do not read causes off a layer that holds no nats.
# 5. Check the layered code with linear layers first: there all is known.
#
# The headline of this page, asserted: without warm-up the ladder is far behind; with it, it has the best
# bound of the three guides, all of it in the upper layer, while the bottom-up guide uses both; two layers
# end ahead of one.

# %%
if not SMOKE:
    assert without.loc["ladder", "ELBO"] < without["ELBO"].drop("ladder").min() - 3.0
    assert without.loc["ladder", "nats in z1"] < 0.1
    assert with_it["ELBO"].idxmax() == "ladder"
    assert with_it.loc["ladder", "ELBO"] > without.loc["ladder", "ELBO"] + 4.0
    assert with_it.loc["ladder", "nats in z1"] < 0.3
    assert with_it.loc["bottom up", ["nats in z1", "nats in z2"]].min() > 1.0
    assert both["two layers"]["log p(x)"] > both["one layer"]["log p(x)"] + 0.05
"all as promised"
