"""Where the files of data sets are at hand; and nothing here reaches further than this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ppl_models.data import Dataset, cache, load

BESIDE = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    download = cache._download

    def local(url: str, label: str) -> bytes:
        if not url.startswith("http://127.0.0.1:"):
            raise AssertionError(f"a test would have fetched {url}")
        return download(url, label)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_download", local)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield


@pytest.fixture(scope="session")
def files() -> Path:
    """The folder that may hold files of data sets."""
    return Path(os.environ.get(cache.VARIABLE, BESIDE))


@pytest.fixture(scope="session")
def at_hand(files: Path) -> Callable[[str, str], Path]:
    """Return the path of a file of a data set, or skip with its name."""

    def path(name: str, place: str) -> Path:
        if not (files / place).is_file():
            pytest.skip(f"{name} is not at hand: there is no {files / place}")
        return files / place

    return path


@pytest.fixture(scope="session")
def load_at_hand(files: Path, at_hand) -> Callable[..., Dataset]:
    """Load a data set if its file is at hand, or skip with its name."""

    def get(name: str, place: str, **arguments) -> Dataset:
        at_hand(name, place)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(cache.VARIABLE, str(files))
            return load(name, **arguments)

    return get


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that holds nothing, not even itself."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"
