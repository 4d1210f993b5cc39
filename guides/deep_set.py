"""A guide that reads a whole data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from guides.amortized import Amortized
from guides.base import Families, key
from guides.local import Local
from ppl_models.bnn import Tasks
from ppl_models.core.batch import as_batch, check_model
from ppl_models.core.checks import checked_sizes
from ppl_models.core.sites import example_batch
from ppl_models.parts.likelihoods import Classes
from ppl_models.parts.nn import mlp


class DeepSet(Amortized):
    r"""A network reads the rows of a task as a set, and puts out what its weights may be.

    .. math::

        h_t = \rho\left(\frac{1}{N} \sum_n \phi(x_{tn}, y_{tn}), \ \log N\right), \qquad
        q(w_t) = \mathcal{N}(W_1 h_t + b_1, \ \mathrm{diag}\, \exp(W_2 h_t + b_2))

    The order of the rows does not matter, and there may be another number of them than in training.
    Trained once on many tasks, it knows the weights of a new one of the same kind without a fit:
    see `given`. All sites are independent of each other given the task.

    Arguments:
        model: `Tasks(...)`.
        hidden: Units of each tanh layer, both of phi and of rho.
        family: As in `Amortized`.
        example: Two or more tasks to trace the model with, such as `(x[:2], y[:2])`.
        plate: Name of the plate over tasks.

    Raises:
        ValueError: If the model is another one, `hidden` no positive integers, or there is no example.

    Source:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov & Smola (2017).
        https://arxiv.org/abs/1703.06114

    Example:
        >>> from ppl_models import BayesianNeuralNetwork
        >>> tasks = Tasks(BayesianNeuralNetwork(data_dim=3, hidden=(8,)))
        >>> x, y = torch.randn(4, 10, 3), torch.randn(4, 10)
        >>> guide = DeepSet(tasks, hidden=(16,), example=(x, y))
        >>> guide.given(x[0], y[0]).q("0.weight").event_shape
        torch.Size([8, 3])
    """

    def __init__(
        self,
        model: Tasks,
        *,
        hidden: Sequence[int] = (100, 100),
        family: Families = None,
        example: Any = None,
        plate: str = "data",
    ) -> None:
        if not isinstance(model, Tasks):
            raise ValueError(
                "DeepSet: model must be Tasks(...), whose rows are whole data sets, got "
                f"{type(model).__name__}. Use Tasks(model), or Amortized."
            )
        hidden = checked_sizes("DeepSet", "hidden", hidden, least=1)
        x, y = as_batch(example_batch(model, example), model)
        likelihood = model.single.observation
        classes = likelihood.classes if isinstance(likelihood, Classes) else 0
        super().__init__(
            model,
            family=family,
            encoder=_Set(_rows(x, y, classes).shape[-1], hidden, classes),
            mean_field=True,
            example=(x, y),
            plate=plate,
        )

    def given(self, x: Tensor, y: Tensor) -> Local:
        """Return a guide of the model of one task, with the numbers that the set gives for it.

        It is as good as a fitted one for `predict(tasks.single, ...)`, where `sample` starts
        (`init=`), and in a further `fit`, which leaves this guide as it is.

        Arguments:
            x: Covariates of the task, shape (N, *event).
            y: Its targets, shape (N,).

        Raises:
            ValueError: If they are not what the model describes.
        """
        tasks: Any = self._model[0]
        batch = as_batch((x, y), tasks.single)
        check_model(tasks.single, batch, plate=self.plate, rows=len(batch[0]))
        guide = Local(
            tasks.single,
            family=self.families,
            example=tuple(value[0] for value in self._example),
            plate=self.plate,
        )
        guide.conditionals.load_state_dict(self.conditionals.state_dict())
        with torch.no_grad():
            for name in self.local_sites():
                numbers = self.parameters_of(name, *(value[None] for value in batch))
                guide.global_parameters[key(name)].copy_(numbers[0])
        return guide


class _Set(nn.Module):
    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.each = mlp(inputs, hidden)
        self.all = mlp(hidden[-1] + 1, hidden)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Read tasks, (T, N, ...) each, into features of shape (T, H)."""
        if y is None:
            raise ValueError(
                "DeepSet: it reads a task as a whole, both x and y, but got x alone. To predict one, "
                "predict(tasks.single, guide.given(x, y), new_x)."
            )
        mean = self.each(_rows(x, y, self.classes)).mean(1)
        count = torch.full_like(mean[:, :1], math.log(x.shape[1]))
        return self.all(torch.cat([mean, count], dim=-1))


def _rows(x: Tensor, y: Tensor, classes: int) -> Tensor:
    """Join what there is of each row: (T, N, F)."""
    y = one_hot(y.long(), classes) if classes else y
    return torch.cat([x.reshape(*x.shape[:2], -1), y.reshape(*y.shape[:2], -1).to(x)], dim=-1)
