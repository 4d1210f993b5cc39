"""Local reparametrisation: the outputs of a layer are drawn in place of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.func import functional_call
from torch.nn.functional import linear

from ppl_models.core.batch import as_batch
from ppl_models.core.module import NamedModule
from ppl_models.core.sites import describe_program, site_table
from ppl_models.core.types import Distribution
from ppl_models.parts.nn import Network
from ppl_models.parts.priors import Bayesian, Plain

ROWS = 3  # of the batch that shapes are read off: two could be anything


def local_reparametrization(
    model: nn.Module, guide: nn.Module, *, example: Any = None, plate: str = "data"
) -> tuple[nn.Module, nn.Module]:
    r"""Give each row a draw of its own of what a layer does to it, in place of one for all rows.

    .. math::

        h_n = x_n M^T + m + \sqrt{x_n^2 {S^2}^T + s^2} \odot \epsilon_n, \qquad
        \epsilon_n \sim \mathcal{N}(0, I)

    where the guide has :math:`\mathcal{N}(M, S^2)` for the weights and :math:`\mathcal{N}(m, s^2)`
    for the bias. The bound is the same in the mean, since each row's term in it depends on its own
    outputs alone; its gradient varies less, since errors of rows no longer go together. Divergences
    of the weights from their prior enter in closed form.

    It serves each `Linear` and `Conv2d` of a network of `bayesian(...)` that the guide gives
    independent normals and whose prior is normal, given the latents it may depend on (`hierarchical`
    is). Other layers draw their weights as before, and so do all other latents. Where a row has
    several outputs of the same weights, at the places of an image, these are dependent, and drawing
    each by itself would bound another model: the row gets weights of its own there.

    What is returned is for `fit` with `ELBO`, and has the parameters of `model` and `guide`
    themselves: train it, then predict and score with the two that were given. Importance weights of
    the pair are not those of the model.

    Sites, beside those that are left: ``<layer>.noise``, local, and ``<layer>.kl``, global and
    without elements, whose log-density is minus the divergence.

    Arguments:
        model: With one network of `bayesian(...)` in it, such as `BayesianNeuralNetwork`.
        guide: With a method `q(site)` for global latents, such as `Local(model, example=...)`.
        example: A batch of rows, of which there are to be two or more; required unless the model
            has a `data_shape`.
        plate: Name of the plate over rows.

    Returns:
        A model and a guide.

    Raises:
        ValueError: If there is no such network, guide or layer; the message says what is in the way
            of each layer.

    Source:
        Kingma, Salimans & Welling (2015). https://arxiv.org/abs/1506.02557

    Example:
        >>> from guides import Local
        >>> from ppl_models import BayesianNeuralNetwork
        >>> from ppl_models.infer import fit
        >>> x, y = torch.randn(20, 3), torch.randn(20)
        >>> model = BayesianNeuralNetwork(data_dim=3, hidden=(8,))
        >>> guide = Local(model, example=(x, y))
        >>> found = fit(*local_reparametrization(model, guide), (x, y), steps=10, progress=False)
        >>> guide.q("0.weight").event_shape  # trained
        torch.Size([8, 3])
    """
    path, net = _network(model)
    if not isinstance(guide, nn.Module) or not callable(getattr(guide, "q", None)):
        raise ValueError(
            "local_reparametrization: guide must have a method q(site) that tells the distribution "
            f"of a weight, as guides.Local has, but {describe_program(guide)} has none."
        )
    batch = _example(model, example)
    outputs = _outputs(model, net, batch, plate)
    layers, reasons = {}, {}
    network: Any = net.inner.module
    for name, layer in network.net.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d):
            reason = _misfit(net, guide, name, outputs.get(name, []))
            if reason is None:
                layers[name] = _layer(layer, outputs[name][0])
            else:
                reasons[name] = reason
    if not layers:
        told = "; ".join(f"'{name}': {reason}" for name, reason in reasons.items())
        raise ValueError(
            "local_reparametrization: no layer of the network has outputs that are normal under the "
            f"guide. {told or 'It has no Linear and no Conv2d'}."
        )
    mine = _sharing(guide, model)
    other = _sharing(model)
    parent, _, attribute = path.rpartition(".")
    rows = _Rows(other.get_submodule(path), mine, layers, plate)
    setattr(other.get_submodule(parent), attribute, rows)
    try:
        site_table(other, *batch, plate=plate)
    except Exception as error:
        raise ValueError(
            f"local_reparametrization: without weights of the layers {list(layers)} the network "
            f"cannot be run: {error}. It must use them by calling the layers alone; "
            "nn.TransformerEncoderLayer and weight_norm do not. Use fit(model, guide, ...)."
        ) from error
    return other, _Rest(mine, rows.sites, layers, plate)


def _layer(layer: nn.Module, output: torch.Size) -> _Layer:
    weight: Any = layer.weight
    if output[1:].numel() == len(weight):
        return _Layer(tuple(output[1:]), True)
    return _Layer((len(weight), weight[0].numel() + (layer.bias is not None)), False)


def _noise(layers: dict[str, _Layer], plate: str, size: int, like: Tensor) -> dict[str, Tensor]:
    """Draw the noise of each row: alike in model and guide, so that their densities cancel."""
    with poutine.block():  # programs have a plate of that name already, and traces take one
        rows = pyro.plate(plate, size)
    with rows:
        return {
            name: pyro.sample(
                _join(name, "noise"),
                dist.Normal(like.new_zeros(about.noise), 1.0).to_event(len(about.noise)),
            )
            for name, about in layers.items()
        }


def _network(model: nn.Module) -> tuple[str, Bayesian]:
    """Find the network, and where it is."""
    modules = model.named_modules() if isinstance(model, nn.Module) else []
    found = {name: module for name, module in modules if isinstance(module, Bayesian)}
    nets = {n: m for n, m in found.items() if n and isinstance(m.inner.module, Network)}
    if len(nets) != 1:
        raise ValueError(
            "local_reparametrization: model must have one network of bayesian(net, prior), as "
            f"BayesianNeuralNetwork has, but {describe_program(model)} has {len(nets)}."
        )
    return next(iter(nets.items()))


def _example(model: nn.Module, example: Any) -> Any:
    if example is not None:
        return as_batch(example, model)
    shape = getattr(model, "data_shape", None)
    if shape is None:
        raise ValueError(
            "local_reparametrization: pass example=(x[:2],), rows from which to read the shapes of "
            f"the layers; {describe_program(model)} has no data_shape."
        )
    like = next(value for value in model.buffers() if value.is_floating_point())
    return (like.new_zeros(ROWS, *shape),)


def _outputs(
    model: nn.Module, net: Bayesian, batch: Any, plate: str
) -> dict[str, list[torch.Size]]:
    """Run the model, and tell the shape of what each layer puts out, whenever it runs."""
    found: dict[str, list[torch.Size]] = {}

    def watch(name: str) -> Callable[..., None]:
        def seen(layer: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            rows = len(inputs[0]) == len(output) == len(batch[0]) and output.ndim > 1
            found.setdefault(name, []).append(output.shape if rows else torch.Size())

        return seen

    network: Any = net.inner.module
    layers = [
        (n, m) for n, m in network.net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers]
    try:
        site_table(model, *batch, plate=plate)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _misfit(net: Bayesian, guide: Any, name: str, outputs: list[torch.Size]) -> str | None:
    """Say why the outputs of a layer are not drawn; None if they are."""
    if len(outputs) != 1:
        return f"it runs {len(outputs)} times for a row, not once"
    if not outputs[0]:
        return "what it is given has no row for each row of the data"
    network: Any = net.inner.module
    layer = network.net.get_submodule(name)
    trained = [leaf for leaf, _ in layer.named_parameters(recurse=False)]
    if trained:
        return f"its {' and '.join(trained)} is trained, and no latent"
    values = dict(net.inner.named_buffers())
    for leaf, _ in layer.named_buffers(recurse=False):
        site = _join(name, leaf)
        if len(net._aliases.get(site, ())) != 1:
            return f"its {leaf} is shared with another layer"
        for whose, fn in (
            ("prior", net._prior(site, values[net._names[site]])),
            ("guide", guide.q(site)),
        ):
            if not _is_mean_field(fn):
                return f"the {whose} of '{site}' is no independent normal, but {fn}"
    return None


def _is_mean_field(fn: Any) -> bool:
    base = getattr(fn, "base_dist", None)
    return isinstance(fn, torch.distributions.Independent) and type(base) is dist.Normal


def _sharing(program: nn.Module, *others: nn.Module) -> Any:
    """Copy a program, but not its tensors: what trains the copy trains the program."""
    tensors = [*program.parameters(), *program.buffers()]
    return copy.deepcopy(program, {id(kept): kept for kept in (*tensors, *others)})


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


@dataclass(frozen=True)
class _Layer:
    """A layer that is served: the shape of a row's noise, and whether that is of its outputs."""

    noise: tuple[int, ...]
    of_outputs: bool


class _Noisy(nn.Module):
    """A layer whose weights are normal, given what they are and the noise of each row."""

    def __init__(self, layer: nn.Module, about: _Layer) -> None:
        super().__init__()
        self.layer = layer
        self.of_outputs = about.of_outputs
        # They stand for what a run passes in, and tell the dimensions of it.
        for leaf, value in layer.named_buffers(recurse=False):
            self.register_buffer(f"{leaf}_loc", torch.zeros_like(value))
            self.register_buffer(f"{leaf}_scale", torch.zeros_like(value))
        self.register_buffer("noise", torch.zeros(1, *about.noise))

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Any] = dict(self.named_buffers(recurse=False))
        loc: list[Any] = [values.get(f"{leaf}_loc") for leaf in ("weight", "bias")]
        scale: list[Any] = [values.get(f"{leaf}_scale") for leaf in ("weight", "bias")]
        noise = values["noise"]
        if self.of_outputs:
            mean = self._out(x, *loc)
            squares: list[Any] = [s if s is None else s.square() for s in scale]
            variance = self._out(x.square(), *squares)
            # A row of zeros has none, and the root no slope there.
            return mean + variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt() * noise
        weight = loc[0] + scale[0] * noise[..., : loc[0][0].numel()].reshape(-1, *loc[0].shape)
        if loc[1] is None:
            return torch.vmap(lambda row, w: self._out(row[None], w, None)[0])(x, weight)
        bias = loc[1] + scale[1] * noise[..., -1]
        return torch.vmap(lambda row, w, b: self._out(row[None], w, b)[0])(x, weight, bias)

    def _out(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Conv2d):
            return self.layer._conv_forward(x, weight, bias)
        return linear(x, weight, bias)


class _Rows(NamedModule):
    """A network of `bayesian` in which rows have noise of their own."""

    def __init__(
        self, net: Bayesian, guide: nn.Module, layers: dict[str, _Layer], plate: str
    ) -> None:
        super().__init__()
        self.plate = plate
        self.layers = layers
        self._guide: Any = [guide]  # in a list: it is no part of the model
        network: Any = net.inner.module
        self.sites: dict[str, str] = {}  # of the weights that are not drawn, and their layers
        for name, about in layers.items():
            layer = network.net.get_submodule(name)
            for leaf, _ in layer.named_buffers(recurse=False):
                site = f"{name}.{leaf}".lstrip(".")
                self.sites[site] = name
                net._names[site] = f"module.net.{_join(name, 'layer', leaf)}"
            if name:
                parent, _, attribute = name.rpartition(".")
                setattr(network.net.get_submodule(parent), attribute, _Noisy(layer, about))
            else:
                network.net = _Noisy(layer, about)
        net.inner.module = Network(network.net, network.event_dim)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.net.draw(self._sample)
        values: dict[str, Tensor] = {}
        divergences: dict[str, Tensor] = {}
        for site, value in drawn.items():
            layer = self.sites.get(site)
            if layer is None:
                values.update((full, value) for full in self.net._aliases[site])
                continue
            q, p = value
            divergences[layer] = divergences.get(layer, 0.0) + kl_divergence(q, p)
            leaf = f"module.net.{_join(layer, site.rpartition('.')[2])}"
            values[f"{leaf}_loc"] = q.base_dist.loc
            values[f"{leaf}_scale"] = q.base_dist.scale
        for layer, divergence in divergences.items():
            pyro.sample(_join(layer, "kl"), dist.Unit(-divergence, has_rsample=True))
        network: Any = self.net.inner.module
        size = x.shape[-1 - network.event_dim]
        for layer, noise in _noise(self.layers, self.plate, size, x).items():
            about = self.layers[layer]
            own = 1 + len(about.noise)
            if noise.ndim > own:  # rows are in a plate, and to the network within an input
                noise = noise.unsqueeze(-1 - own)
            values[f"module.net.{_join(layer, 'noise')}"] = noise
        return functional_call(self.net.inner, values, (x,))

    def _sample(self, site: str, prior: Distribution) -> Any:
        if site not in self.sites:
            return pyro.sample(site, prior)
        return self._guide[0].q(site), prior


class _Without(Messenger):
    """Draw nothing at some sites: what is drawn and not used would be missing in a recording."""

    def __init__(self, sites: Collection[str]) -> None:
        super().__init__()
        self.sites = sites

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.sites:
            msg["value"] = msg["fn"].mean
            msg["done"] = msg["stop"] = True


class _Rest(NamedModule):
    """A guide without the weights whose layers are served."""

    def __init__(
        self, guide: nn.Module, sites: dict[str, str], layers: dict[str, _Layer], plate: str
    ) -> None:
        super().__init__()
        self.plate = plate
        self.layers = layers
        self.hidden = list(sites)
        self.guide = Plain(guide)

    def forward(self, *batch: Tensor) -> None:
        with _Without(self.hidden):
            self.guide(*batch)
        like = next(value for value in batch if value.is_floating_point())
        for layer in self.layers:
            pyro.sample(_join(layer, "kl"), dist.Unit(like.new_zeros(()), has_rsample=True))
        _noise(self.layers, self.plate, len(batch[0]), like)
