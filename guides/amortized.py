"""Amortised guides: a network reads the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guides.base import Families, SiteGuide, key
from ppl_models.core.batch import as_batch
from ppl_models.parts.nn import mlp

if TYPE_CHECKING:
    from guides.local import Local


class Amortized(SiteGuide):
    r"""A network reads the batch and puts out the parameters of each local latent.

    .. math::

        h_n = \tanh(W x_n + b), \qquad
        q(z_n \mid x_n) = \mathcal{N}(W_1 h_n + b_1, \ \mathrm{diag}\, \exp(W_2 h_n + b_2))

    Several local latents are sampled in the order of the model, each given the batch and all
    earlier ones. Global latents have free parameters. All parameters exist at construction, and the
    model is not one of its submodules.

    Arguments:
        model: Any Pyro model.
        hidden: Units of each tanh layer of the encoder; empty for a linear one.
        family: The family of the local latents, or one for each site by name. By default, the
            first of `families.ALL` that serves the support.
        encoder: Any network that maps the batch, `encoder(*batch)`, to features of shape (N, H).
            By default a tanh network on all floating arguments, flattened and joined.
        mean_field: Condition on the batch only, not on earlier local latents.
        bottom_up: Draw the local latents in the opposite order to the model's, from the data
            upwards, as recognition networks do.
        example: A batch of two or more rows to trace the model with; required unless the model can
            draw one with `model(size=2)`.
        plate: Name of the plate over rows.

    Raises:
        ValueError: If the model has no latent or no local latent, a family cannot serve a site, an
            example is needed, or the encoder puts out something else than (N, H).

    Source:
        Kingma & Welling (2014). https://arxiv.org/abs/1312.6114

    Example:
        >>> from ppl_models import VAE
        >>> guide = Amortized(VAE(data_dim=64, latent_dim=2), hidden=(32,))
        >>> guide.q("z", torch.zeros(5, 64)).batch_shape
        torch.Size([5])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        hidden: Sequence[int] = (200,),
        family: Families = None,
        encoder: nn.Module | None = None,
        mean_field: bool = False,
        bottom_up: bool = False,
        example: Any = None,
        plate: str = "data",
    ) -> None:
        super().__init__(model, family=family, example=example, plate=plate)
        if bottom_up:
            order = [n for n, site in self._sites.items() if not site.local]
            order += reversed(self.local_sites())
            self._sites = {name: self._sites[name] for name in order}
        names = self.local_sites()
        if not names:
            raise ValueError(
                f"Amortized: no latent is inside plate '{plate}', so there is nothing to read off "
                f"a row; the latents are {list(self._sites)}. Use guides.Local, whose parameters "
                "are free, or name the plate with plate=..."
            )
        self.mean_field = mean_field
        self.encoder = _default_encoder(self._example, hidden) if encoder is None else encoder
        self.encoder.to(device=self._like.device, dtype=self._like.dtype)
        features = _features(self.encoder, self._example)
        self.heads = nn.ModuleDict()
        earlier = 0
        for name in names:
            head: nn.Module = nn.Linear(features, self.numbers(name))
            if earlier:
                head = mlp(features + earlier, (features,), self.numbers(name))
            self.heads[key(name)] = head
            if not mean_field:
                earlier += self.flat(name, self._sites[name].value).shape[-1]
        self.to(device=self._like.device, dtype=self._like.dtype)

    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Return what the network puts out for a local latent."""
        seen = self.encoder(*batch)
        if not self.mean_field:
            names = self.local_sites()
            before = names[: names.index(site)]
            values = [self.flat(name, earlier[name]) for name in before]
            if values:
                lead = torch.broadcast_shapes(*(v.shape[:-1] for v in values), seen.shape[:-1])
                joined = [v.expand(*lead, v.shape[-1]) for v in (seen, *values)]
                seen = torch.cat(joined, dim=-1)
        return self.heads[key(site)](seen)

    def local(self, *batch: Tensor) -> Local:
        """Return the same family with free parameters for these rows, started at this guide.

        Refined (see `Local.refine`), it shows what the network loses: the amortisation gap.
        """
        from guides.local import Local  # a guide that this one becomes; it knows this one not

        return Local.started_at(self, *as_batch(batch, self))


class _Flatten(nn.Module):
    """Join the floating arguments of a batch, row by row."""

    def forward(self, *batch: Tensor) -> Tensor:
        floats = [v.reshape(len(v), -1) for v in batch if v.is_floating_point()]
        return torch.cat(floats, dim=-1)


class _Encoder(nn.Module):
    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.join = _Flatten()
        self.net = mlp(inputs, hidden)

    def forward(self, *batch: Tensor) -> Tensor:
        return self.net(self.join(*batch))


def _default_encoder(batch: tuple[Tensor, ...], hidden: Sequence[int]) -> nn.Module:
    if not any(value.is_floating_point() for value in batch):
        raise ValueError(
            "Amortized: the encoder reads the floating arguments of the batch, and there is none: "
            f"dtypes {[str(value.dtype) for value in batch]}. Pass encoder=..., a network that "
            "maps the batch to features of shape (N, H)."
        )
    return _Encoder(_Flatten()(*batch).shape[-1], hidden)


def _features(encoder: nn.Module, batch: tuple[Tensor, ...]) -> int:
    """Run an encoder on two rows, leave it as it was, and count its features."""
    training = encoder.training
    try:
        with torch.no_grad():
            out = encoder.eval()(*batch)
    except Exception as error:
        shapes = [tuple(value.shape) for value in batch]
        raise ValueError(f"Amortized: encoder fails on rows of shapes {shapes}: {error}") from error
    finally:
        encoder.train(training)
    if out.ndim != 2 or len(out) != len(batch[0]):
        raise ValueError(
            f"Amortized: encoder must put out features of shape ({len(batch[0])}, H) for "
            f"{len(batch[0])} rows, got {tuple(out.shape)}. Add a Flatten layer."
        )
    return out.shape[-1]
