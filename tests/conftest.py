"""What every test stands on: one thread, float64, a seed, an empty parameter store."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pyro
import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")
torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    sys.modules.pop("ipykernel", None)  # an earlier test's: it would say that somebody is looking
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile into a folder of this run, which its processes share: no earlier run decides."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPL_MODELS_CACHE", str(place / "steps"))
        yield
