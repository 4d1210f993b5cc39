"""Draws for ArviZ."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ppl_models.infer.mcmc.posterior import Posterior


def to_datatree(posterior: Posterior) -> Any:
    """Hand draws and statistics to ArviZ: see `Posterior.to_datatree`."""
    try:
        arviz_base = import_module("arviz_base")
    except ImportError as error:
        raise ImportError(
            "Posterior.to_datatree needs arviz-base: pip install 'ppl-models[arviz]', or "
            "pip install arviz-base."
        ) from error
    # Rows come with the transitions: (chain, draw, row).
    statistics = _statistics(posterior)
    dims = {name: ["row"] for name, value in statistics.items() if value.ndim == 3}
    groups = {"posterior": {name: _array(value) for name, value in posterior.items()}}
    if statistics:
        groups["sample_stats"] = statistics
    attributes = {
        "inference_library": "ppl_models",
        "sampling_time": posterior.seconds,
        "tuning_steps": posterior.warmup,
    }
    return arviz_base.from_dict(groups, dims=dims, attrs=dict.fromkeys(groups, attributes))


def _statistics(posterior: Posterior) -> dict[str, np.ndarray]:
    names = {"divergent": "diverging", "depth": "tree_depth", "leapfrogs": "n_steps"}
    found = {names.get(name, name): _array(value) for name, value in posterior.statistics().items()}
    if posterior.depth is not None and posterior.max_depth is not None:
        found["reached_max_treedepth"] = _array(posterior.depth >= posterior.max_depth)
    if posterior.step_size is not None:  # it was held while the draws were made
        sizes = _array(posterior.step_size)[:, None]
        shape = (posterior.chains, posterior.draws, *sizes.shape[2:])
        found["step_size"] = np.broadcast_to(sizes, shape).copy()
    return found


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
