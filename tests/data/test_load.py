"""Data sets by name: what an unknown name says, and which arguments fit which."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ppl_models.data import Dynamic, cache, load
from ppl_models.data.load import NAMES


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no data set 'digit'\. Did you mean 'digits'\?"):
        load("digit")
    with pytest.raises(ValueError, match=r"no data set 'xyzzy'\. Known: digits, mnist, .*yacht\."):
        load("xyzzy")
    with pytest.raises(ValueError, match=r"no data set 'boston'\. Did you mean 'uci/boston'\?"):
        load("boston")


def test_arguments_that_do_not_fit_the_data_set_are_refused(empty_cache) -> None:
    with pytest.raises(ValueError, match=r"digits has one split; only uci/\* have .*split=3"):
        load("digits", split=3)
    with pytest.raises(ValueError, match=r"split must be 0 to 19, got 20"):
        load("uci/boston", split=20)
    with pytest.raises(ValueError, match=r"split must be an integer >= 0, got -1"):
        load("uci/boston", split=-1)
    with pytest.raises(ValueError, match=r"digits: binarize must be None, .* 'dynamc'"):
        load("digits", binarize="dynamc")
    for how in ("threshold", "dynamic"):
        said = rf"binarized_mnist is a static .*For another one load\('mnist', binarize='{how}'\)"
        with pytest.raises(ValueError, match=said):
            load("binarized_mnist", binarize=how)


def test_what_does_not_fit_is_said_before_anything_is_fetched(empty_cache) -> None:
    with pytest.raises(ValueError, match="binarize must be None"):
        load("mnist", binarize="statik")
    with pytest.raises(ValueError, match="uci/boston: binarize='static' needs images"):
        load("uci/boston", binarize="static")


def test_drawn_digits_are_always_the_same() -> None:
    static, dynamic = load("digits", binarize="static"), load("digits", binarize="dynamic")
    assert int(static.x.sum()) == 27921
    assert isinstance(dynamic.x, Dynamic)
    assert torch.equal(static.x_test, dynamic.x_test)
    assert torch.equal(static.y, load("digits").y)


def test_every_name_is_in_the_docstring_and_in_the_table_of_the_documentation() -> None:
    table = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert name in load.__doc__
        assert f"`{name}`" in table


def test_the_examples_of_the_documentation_run(tmp_path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    first, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(first, scope)  # noqa: S102 - our own text
    printed = capsys.readouterr().out
    assert printed.strip() == re.search(r"print\(digits\)  # (.*)", first).group(1)
    sizes = []
    for example in others:
        exec(example, scope)  # noqa: S102 - our own text
        sizes.append(tuple(scope["data"].x.shape))
    assert sizes == [(80, 4), (16, 784)]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_the_documentation_is_right(name, files, monkeypatch) -> None:
    monkeypatch.setenv("PPL_MODELS_DATA", str(files))
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| `{name}` \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE)

    def offline(url, label) -> bytes:
        raise ConnectionError(url)

    monkeypatch.setattr(cache, "_download", offline)
    monkeypatch.setattr(cache, "_writable", lambda *arguments: None)
    try:
        data = load(name)
    except OSError as error:
        pytest.skip(f"{name} is not at hand: {error}")
    parts = [data.x, *([] if data.x_valid is None else [data.x_valid]), data.x_test]
    assert cells[0] == ", ".join(str(len(part)) for part in parts)
    row = "{} x {}".format(*data.image_shape) if data.image_shape else str(data.x.shape[1])
    assert re.search(rf"\b{row}\b", cells[1])
