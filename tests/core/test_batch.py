"""Data from outside is converted once, and refused with a reason."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ppl_models import PPCA, VAE
from ppl_models.core.batch import as_batch, check_device, check_model, parameter_like
from ppl_models.parts.likelihoods import Categorical


def test_a_tensor_comes_through_as_it_is() -> None:
    x = torch.randn(4, 3)
    (got,) = as_batch(x)
    assert got.data_ptr() == x.data_ptr()
    assert torch.equal(got, x)


def test_floating_data_take_the_precision_of_the_model_and_codes_do_not() -> None:
    model = nn.Linear(2, 2).float()
    x, codes = as_batch((torch.randn(4, 2), torch.arange(4)), model)
    assert (x.dtype, codes.dtype) == (torch.float32, torch.int64)
    (y,) = as_batch(np.zeros((4, 2)), model)
    assert y.dtype == torch.float32
    (z,) = as_batch(np.zeros((4, 2), dtype=np.float32))
    assert z.dtype == torch.float64  # no model: torch's default


def test_the_result_carries_no_gradient() -> None:
    (x,) = as_batch(torch.randn(4, 2, requires_grad=True))
    assert not x.requires_grad


@pytest.mark.parametrize("data", [[[1.0, 2.0], [3.0, 4.0]], np.array([[1.0, 2.0], [3.0, 4.0]])])
def test_arrays_become_tensors(data: Any) -> None:
    (x,) = as_batch((data,))
    assert torch.equal(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_a_tuple_keeps_its_order() -> None:
    x, y = torch.randn(3, 2), torch.arange(3)
    got = as_batch((x, y))
    assert torch.equal(got[0], x)
    assert torch.equal(got[1], y)
    assert as_batch(()) == ()


class Bare(Dataset[Tensor]):
    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, n: int) -> Tensor:
        return torch.full((2,), float(n))


def test_datasets_are_read_row_by_row() -> None:
    x, y = torch.randn(5, 2), torch.arange(5)
    got = as_batch(TensorDataset(x, y))
    assert torch.equal(got[0], x)
    assert torch.equal(got[1], y)
    (alone,) = as_batch(Bare(3))
    assert torch.equal(alone, torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3), r"argument 'x' must have at least one row, got shape \(0, 3\)"),
        (np.zeros((0, 3)), r"argument 'x' must have at least one row, got shape \(0, 3\)"),
        (torch.tensor(1.0), r"argument 'x' must have at least one row, got shape \(\)"),
        (Bare(0), "the Dataset is empty"),
        (torch.tensor([[0.0, torch.nan], [torch.inf, 0.0]]), r"2 of 4 values .* first at \(0, 1\)"),
        (np.array([[0.0, -np.inf]]), r"1 of 2 values are NaN or infinite.*Drop or impute"),
        (np.array([["a", "b"]]), "argument 'x' must hold numbers, got ndarray of dtype <U1"),
        ("abc", "argument 'x' must hold numbers, got str"),
        (None, "argument 'x' must hold numbers, got NoneType of dtype object"),
        (np.array([{}]), "must hold numbers, got ndarray of dtype object"),
    ],
)
def test_what_is_no_data_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_batch(data, PPCA(data_dim=3, latent_dim=1))


def test_arguments_of_different_lengths_are_refused_by_name() -> None:
    def model(pixels: Tensor, labels: Tensor) -> None: ...

    with pytest.raises(ValueError, match=r"same number of rows, got pixels: 3, labels: 4"):
        as_batch((torch.zeros(3, 2), torch.zeros(4)), model)
    with pytest.raises(ValueError, match="argument 1: 3, argument 2: 4"):
        as_batch((torch.zeros(3, 2), torch.zeros(4)))


def test_parameters_speak_for_their_module_and_buffers_where_there_are_none() -> None:
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.arange(2))
            self.register_buffer("loc", torch.zeros(2))

    module = Buffered()
    assert parameter_like(lambda x: x, module) is module.loc
    assert parameter_like(lambda x: x) is None


def test_a_device_is_checked() -> None:
    assert check_device(None) is None
    assert check_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: torch knows no device 'gpuu'"):
        check_device("gpuu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    for device in ("cuda", "cuda:3", torch.device("cuda")):
        with pytest.raises(ValueError, match=r"device: 'cuda.*finds 0 CUDA devices.*'cpu'"):
            check_device(device)


def table_of(model: Any, *batch: Tensor, rows: int = 4) -> Any:
    return check_model(model, as_batch(batch, model), plate="data", rows=rows)


def test_data_that_fit_give_the_table_of_their_first_rows() -> None:
    table = table_of(PPCA(data_dim=3, latent_dim=1), torch.randn(9, 3))
    assert [site.name for site in table] == ["z", "x"]
    assert table["x"].batch_shape == (4,)


@pytest.mark.parametrize(
    ("shape", "got"),
    [((6, 2), "(4, 2)"), ((6, 4), "(4, 4)"), ((6, 1, 3), "(4, 1, 3)"), ((6,), "(4,)")],
)
def test_wrong_width_and_rank_are_refused(shape: tuple[int, ...], got: str) -> None:
    message = "argument 'x' (site 'x'): the model describes values of shape (4, 3)"
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(f"got {got}")):
        table_of(PPCA(data_dim=3, latent_dim=1), torch.zeros(shape))


def test_integers_are_refused_where_values_are_continuous_or_float_by_contract() -> None:
    with pytest.raises(ValueError, match=r"'x'.*Normal needs floating.*got torch.int64.*x.float"):
        table_of(PPCA(data_dim=3, latent_dim=1), torch.ones(6, 3, dtype=torch.int64))
    vae = VAE(data_dim=3, latent_dim=1, hidden=(2,))
    with pytest.raises(ValueError, match=r"Bernoulli needs floating point values, got torch.int64"):
        table_of(vae, torch.ones(6, 3, dtype=torch.int64))
    assert len(table_of(vae, torch.ones(6, 3))) == 2


def test_integers_are_welcome_where_values_are_counts() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(torch.tensor(2.0)), obs=x)

    assert len(table_of(model, torch.arange(6))) == 1


def test_grey_values_are_refused_by_a_bernoulli_with_a_hint() -> None:
    x = torch.ones(6, 4)
    x[5, 1:] = torch.tensor([0.0, 0.5, 2.0])  # beyond the rows that are traced
    message = r"Bernoulli has support 'boolean vector', but 16.67% .* from 0 to 2\).*[Bb]inari"
    with pytest.raises(ValueError, match=message):
        table_of(VAE(data_dim=4, latent_dim=1, hidden=(2,)), x)


def test_values_outside_other_supports_are_refused() -> None:
    one_hot = VAE(data_dim=2, latent_dim=1, hidden=(2,), likelihood=Categorical(3))
    with pytest.raises(ValueError, match=r"OneHotCategorical.*100.00% of the values are outside"):
        table_of(one_hot, torch.zeros(6, 2, 3))

    def positive(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(1.0), obs=y)

    with pytest.raises(ValueError, match=r"'y'.*non-negative.*25.00% .* from -1 to 1") as error:
        table_of(positive, torch.tensor([1.0, 1.0, 1.0, -1.0]))
    assert "inaris" not in str(error.value)  # the hint is for Bernoulli


def test_a_model_that_fails_says_on_what_and_why() -> None:
    def model(a: Tensor, b: Tensor) -> None:
        raise KeyError("nothing here")

    message = r"model cannot be run on this data.*a \(4, 2\) torch.float64, b \(4,\).*\n.*KeyError"
    with pytest.raises(ValueError, match=message):
        table_of(model, torch.zeros(5, 2), torch.zeros(5))


def test_checks_leave_the_random_stream_and_the_store_alone() -> None:
    model = PPCA(data_dim=3, latent_dim=1)
    before = torch.get_rng_state()
    table_of(model, torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0
