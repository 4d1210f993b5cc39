"""The guide of a ladder: what the data say of each layer, and what the layer above it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guides.amortized import Amortized
from guides.base import key
from guides.families import Normal
from ppl_models.core.checks import checked_sizes
from ppl_models.dlgm import DeepLatentGaussian
from ppl_models.parts.nn import mlp


class Ladder(Amortized):
    r"""Top-down like the model: at each layer its prior, given the draw above, meets the data.

    A network reads the row from the lowest layer upwards and gives each layer an estimate
    :math:`\hat\mu_l, \hat s_l`. Then the layers are drawn from the top, each from the product of that
    estimate and :math:`p(z_l \mid z_{l+1}) = \mathcal{N}(\mu_l, s_l^2)`,

    .. math::

        q(z_l \mid z_{l+1}, x) = \mathcal{N}\left(
        \frac{\hat\mu_l \hat s_l^{-2} + \mu_l s_l^{-2}}{\hat s_l^{-2} + s_l^{-2}},
        \frac{1}{\hat s_l^{-2} + s_l^{-2}}\right)

    and from the estimate alone at the top. A linear model with one unit in each layer has a posterior
    of this form. Layers are easily left unused: raise `ELBO(kl_weight=)` from 0 in the first half of
    the training.

    Arguments:
        model: A `DeepLatentGaussian`.
        hidden: Units of each tanh layer of the network between one layer and the next.
        example: As in `Amortized`.
        plate: Name of the plate over rows.

    Raises:
        ValueError: If the model is another one, or `hidden` no positive integers, one or more.

    Source:
        Sønderby, Raiko, Maaløe, Sønderby & Winther (2016). https://arxiv.org/abs/1602.02282

    Example:
        >>> import torch
        >>> model = DeepLatentGaussian(data_dim=6, latent_dims=(3, 2))
        >>> guide = Ladder(model, hidden=(8,))
        >>> guide.q("z2", torch.zeros(4, 6)).event_shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: DeepLatentGaussian,
        *,
        hidden: Sequence[int] = (200,),
        example: Any = None,
        plate: str = "data",
    ) -> None:
        if not isinstance(model, DeepLatentGaussian):
            raise ValueError(
                "Ladder: model must be a DeepLatentGaussian, whose layers have normal priors, got "
                f"{type(model).__name__}. Use Amortized."
            )
        hidden = checked_sizes("Ladder", "hidden", hidden, least=1)
        super().__init__(
            model, hidden=hidden, family=Normal(), mean_field=True, example=example, plate=plate
        )
        like, width = self._like, hidden[-1]
        self.ascent = nn.ModuleList(mlp(width, hidden) for _ in range(len(model.latent_dims) - 1))
        self.ascent.to(device=like.device, dtype=like.dtype)

    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Return loc and log squared scale of a layer."""
        model: Any = self._model[0]
        level = int(site.removeprefix("z"))
        seen = self.encoder(*batch)
        for step in self.ascent[: level - 1]:
            seen = step(seen)
        loc, log_square = self.heads[key(site)](seen).chunk(2, -1)
        if level == len(model.latent_dims):
            return torch.cat([loc, log_square], -1)
        prior = model.conditional(level, earlier[f"z{level + 1}"]).base_dist
        above = 2.0 * prior.scale.log()
        weight = torch.sigmoid(above - log_square)  # of what the data say
        loc = weight * loc + (1.0 - weight) * prior.loc
        log_square = above + nn.functional.logsigmoid(log_square - above)
        return torch.cat(torch.broadcast_tensors(loc, log_square), -1)
