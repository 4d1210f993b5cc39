"""Classical iterative variational inference: free parameters for each row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from guides.base import Families, SiteGuide, expanded, key
from ppl_models.core.batch import as_batch
from ppl_models.core.minibatch import current_minibatch
from ppl_models.infer.estimators import estimators_for
from ppl_models.infer.gradients import LeaveOneOut
from ppl_models.infer.objectives import ELBO, Bound
from ppl_models.infer.svi import fit

REFINING = 10  # particles, where the others are the baseline of each


class Local(SiteGuide):
    r"""Each row has parameters of its own: :math:`q(z_n) = q(z_n; \lambda_n)`.

    It is the classical, iterative form of variational inference, without the amortisation gap and
    without an answer for new rows: those have to be refined. Under minibatches each row finds its
    parameters by its index (`fit` passes it on). Latents are independent of each other.

    Arguments:
        model: Any Pyro model.
        rows: Rows N of the data set; None for a model without local latents.
        family: The family of the local latents, or one for each site by name. By default, the
            first of `families.ALL` that serves the support.
        example: A batch of two or more rows to trace the model with; required unless the model can
            draw one with `model(size=2)`.
        plate: Name of the plate over rows.

    Raises:
        ValueError: If `rows` is missing or not positive, or a family cannot serve a site; when
            called, if the batch has another number of rows.

    Source:
        Jordan, Ghahramani, Jaakkola & Saul (1999). https://doi.org/10.1023/A:1007665907178

    Example:
        >>> from ppl_models import PPCA
        >>> model = PPCA(data_dim=5, latent_dim=2)
        >>> guide = Local(model, rows=100)
        >>> guide.q("z", torch.zeros(100, 5)).batch_shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rows: int | None = None,
        family: Families = None,
        example: Any = None,
        plate: str = "data",
    ) -> None:
        super().__init__(model, family=family, example=example, plate=plate)
        names = self.local_sites()
        if names and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(
                f"Local: rows must be the number of rows of the data set, an integer >= 1, because "
                f"each row has its own {names}; got {rows!r}. Use Local(model, rows=len(x))."
            )
        self.rows = rows if names else None
        # Whether the numbers come from another guide: in a buffer, so that it is saved with them.
        self._started: Tensor
        self.register_buffer("_started", torch.tensor(False))
        self.row_parameters = nn.ParameterDict(
            {key(name): expanded(self._start(name), (rows or 1,)) for name in names}
        )
        self.to(device=self._like.device, dtype=self._like.dtype)

    def parameters_of(self, site: str, /, *batch: Tensor, **earlier: Tensor) -> Tensor:
        """Return the rows' own numbers."""
        table = self.row_parameters[key(site)]
        current = current_minibatch(self.plate)
        if current is not None:
            if current.size != self.rows:
                raise ValueError(
                    f"Local: rows must be {current.size}, the rows of the data set, got rows="
                    f"{self.rows}. For other rows than those it was made for, use guide.refine(x)."
                )
            return table[current.index.to(table.device)]
        if len(batch[0]) != self.rows:
            raise ValueError(
                f"Local: rows must be {len(batch[0])}, the rows of this batch, got rows="
                f"{self.rows}. For new rows use guide.refine(x); for a part of the data set, "
                "`with minibatch(index, size):`."
            )
        return table

    def refine(
        self,
        *batch: Tensor,
        objective: Bound | None = None,
        steps: int = 500,
        lr: float = 0.05,
        seed: int | None = None,
        **options: Any,
    ) -> Local:
        """Return a guide for new rows, fitted to them; model and shared parameters stay fixed.

        It starts afresh, but for a guide made by `Amortized.local` and as many rows, whose start
        it keeps.

        Arguments:
            batch: The new rows.
            objective: What is ascended, by default the ELBO; where draws carry no gradient, by
                `LeaveOneOut` with ten particles.
            steps: Optimisation steps.
            lr: Learning rate at the start; it falls to 0.
            seed: As in `fit`.
            options: Passed on to `fit`.
        """
        model = self._model[0]
        batch = as_batch(batch, model)
        new = self._like_me(self, len(batch[0]))
        if self._started and self.rows == new.rows:
            new.row_parameters.load_state_dict(self.row_parameters.state_dict())
        if objective is None:
            fitting = estimators_for(model, new, *batch, names=("leave-one-out",))
            objective = ELBO(REFINING, score=LeaveOneOut()) if fitting.objectives else ELBO()
        schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
        options = {"schedule": schedule, "batch_size": len(batch[0])} | options
        fit(
            model,
            new,
            batch,
            objective=objective,
            steps=steps,
            lr=lr,
            seed=seed,
            fixed_model=True,
            **options,
        )
        return new

    @classmethod
    def started_at(cls, guide: SiteGuide, *batch: Tensor) -> Local:
        """Return free parameters for these rows that start where another guide has them.

        What the rows share, global latents and the networks of a flow, is copied and stays fixed.
        """
        new = cls._like_me(guide, len(batch[0]))
        new._started.fill_(True)
        draws: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in guide.local_sites():
                numbers = guide.parameters_of(name, *batch, **draws)
                new.row_parameters[key(name)].copy_(numbers)
                draws[name] = guide.q(name, *batch, **draws).sample()
        return new

    @classmethod
    def _like_me(cls, guide: SiteGuide, rows: int) -> Local:
        new = cls(
            guide._model[0],
            rows=rows,
            family=guide.families,
            example=guide._example,
            plate=guide.plate,
        )
        for mine, theirs in (
            (new.conditionals, guide.conditionals),
            (new.global_parameters, guide.global_parameters),
        ):
            mine.load_state_dict(theirs.state_dict())
            mine.requires_grad_(False)
        return new

    def _start(self, site: str) -> Tensor:
        start = self.conditional(site).initial()
        return start.repeat(self.numbers(site) // len(start))
