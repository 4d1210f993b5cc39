"""Data sets by name: what an unknown name says, and which arguments fit which."""

from __future__ import annotations

import pytest

from ppl_models.data import load


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no data set 'digit'\. Did you mean 'digits'\?"):
        load("digit")
    with pytest.raises(ValueError, match=r"no data set 'xyzzy'\. Known: digits, mnist, .*yacht\."):
        load("xyzzy")
    with pytest.raises(ValueError, match=r"no data set 'boston'\. Did you mean 'uci/boston'\?"):
        load("boston")
