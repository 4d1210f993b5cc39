"""Files of data sets: where they are kept, how they are checked, how they are fetched."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "PPL_MODELS_DATA"
TIMEOUT = 30.0  # seconds without an answer
_UNWRITABLE = (
    "{name}: cannot write to {folder} ({reason}). Set PPL_MODELS_DATA to a folder that can be "
    "written."
)


@dataclass(frozen=True)
class File:
    """A file at its public address.

    Attributes:
        place: Its path within the cache folder.
        url: The address.
        digests: What its content may hash to, as "algorithm:digest"; the first is that of the file
            at the address. None where none is published: then what is made of it is checked.
    """

    place: str
    url: str
    digests: tuple[str, ...] = ()


def folder() -> Path:
    """Return the folder of the cache: `$PPL_MODELS_DATA`, or the system's place for caches."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser()
    import pooch  # imports what downloading needs, which importing the library need not

    return Path(pooch.os_cache("ppl-models"))


def read(name: str, files: Iterable[File]) -> list[bytes]:
    """Return the contents of files, from the cache or else from their addresses.

    Arguments:
        name: The data set that they belong to, for messages.
        files: The files. A fetched one is kept once its hash is right.

    Raises:
        OSError: If a file is not in the cache and cannot be fetched, on one line.
    """
    files = tuple(files)
    return [_content(name, file, keep=True, others=len(files) - 1) for file in files]


def read_arrays(
    name: str,
    place: str,
    expected: str,
    keys: tuple[str, ...],
    files: tuple[File, ...],
    convert: Callable[[list[bytes]], dict[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Return arrays that are kept in one file, made from files of another format when it is not there.

    Arguments:
        name: The data set, for messages.
        place: Path of the .npz within the cache folder.
        expected: What `fingerprint` of the arrays must be.
        keys: The arrays.
        files: The original files. If they are in the cache they are read, otherwise fetched; they
            are not kept.
        convert: Makes just these arrays from their contents.

    Raises:
        OSError: If the arrays are not in the cache and cannot be made, on one line.
    """
    target = folder() / place
    instead = f"or set {VARIABLE} to a folder that has {place}"
    corrupt = None
    if target.is_file():
        arrays, got = _arrays(lambda: _unpack(target, keys))
        if got == expected:
            return arrays
        corrupt = _warn_corrupt(name, target, expected, got, files[0].url)
    fetching = not all((folder() / file.place).is_file() for file in files)
    if fetching:
        _writable(name, target)
    contents = [
        _content(name, file, others=len(files) - 1, instead=instead, corrupt=corrupt)
        for file in files
    ]
    arrays, got = _arrays(lambda: convert(contents))
    if got != expected:
        source = files[0].url if fetching else folder() / files[0].place
        raise OSError(
            f"{name}: {source} does not hold what it should: expected {expected}, got {got}."
            f"{f' {corrupt}' if corrupt else ''} Put a right file at {target}, {instead}."
        )
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    # Originals in a folder that cannot be written are read each time.
    with nullcontext() if fetching else suppress(OSError):
        _keep(name, target, packed.getvalue())
    return arrays


def digest(content: bytes, algorithm: str) -> str:
    """Return a hash of a content; "git" is the one by which git names a file."""
    if algorithm == "git":
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return hashlib.new(algorithm, content).hexdigest()


def fingerprint(arrays: dict[str, np.ndarray]) -> str:
    """Return the sha256 of what arrays hold, whatever file and integer width they are kept in."""
    total = hashlib.sha256()
    for key in sorted(arrays):
        array = arrays[key]
        if array.dtype.kind in "iub":
            array = array.astype("<i8")
        elif array.dtype.kind == "f":
            array = array.astype("<f8")
        elif array.dtype.kind == "U":
            array = np.frombuffer("\n".join(array.ravel().tolist()).encode(), dtype="u1")
        else:
            raise ValueError(f"array {key!r} is of dtype {array.dtype}")
        total.update(f"{key} {array.dtype.kind} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return f"content sha256:{total.hexdigest()}"


def _unpack(path: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    # Opened here: numpy leaves a file open that turns out to be no zip.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
        return {key: kept[key] for key in keys}


def _arrays(make: Callable[[], dict[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], str]:
    """Make arrays and their fingerprint; of a broken file none, and what is wrong with it."""
    try:
        arrays = make()
        return arrays, fingerprint(arrays)
    except Exception as error:  # noqa: BLE001
        # A truncated or flipped byte fails anywhere in zip, zlib, numpy or scipy, each in its way.
        return {}, f"what cannot be read ({type(error).__name__}: {_line(error)})"


def _content(
    name: str,
    file: File,
    *,
    others: int,
    keep: bool = False,
    instead: str = "",
    corrupt: str | None = None,
) -> bytes:
    """Read one of the files of a data set from the cache, or fetch it."""
    target = folder() / file.place
    instead = instead or f"or set {VARIABLE} to a folder that has {file.place}"
    if target.is_file():
        content = target.read_bytes()
        got = _mismatch(content, file)
        if got is None:
            return content
        corrupt = _warn_corrupt(name, target, file.digests[0], got, file.url)
    if keep:
        _writable(name, target)
    beside = f" and the other {others} beside it" if others else ""
    advice = f"{f' {corrupt}' if corrupt else ''} Put the file at {target}{beside}, {instead}."
    try:
        content = _download(file.url, f"{name}: {target.name}")
    except Exception as error:
        # What requests and urllib3 raise offline has no common base but OSError and HTTPError.
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] != "urllib3":
            raise
        raise OSError(f"{name}: cannot fetch {file.url} ({_reason(error)}).{advice}") from None
    got = _mismatch(content, file)
    if got is not None:
        raise OSError(
            f"{name}: {file.url} does not hold what it should: expected {file.digests[0]}, got "
            f"{got}.{advice}"
        )
    if keep:
        _keep(name, target, content)
    return content


def _mismatch(content: bytes, file: File) -> str | None:
    """Return what a content hashes to if that is not one of the file's digests."""
    for expected in file.digests:
        algorithm, _, value = expected.partition(":")
        if digest(content, algorithm) == value:
            return None
    if not file.digests:
        return None
    algorithm = file.digests[0].partition(":")[0]
    return f"{algorithm}:{digest(content, algorithm)} ({len(content)} bytes)"


def _warn_corrupt(name: str, path: Path, expected: str, got: str, url: str) -> str:
    warnings.warn(
        f"{name}: {path} is corrupt: expected {expected}, got {got}; it is fetched again from "
        f"{url}.",
        stacklevel=5,
    )
    return f"The file at {path} is corrupt."


def _download(url: str, label: str) -> bytes:
    """Fetch an address, with a bar on standard error where somebody is looking."""
    import pooch
    from tqdm import tqdm

    looking = sys.stderr.isatty() or "ipykernel" in sys.modules
    content = io.BytesIO()
    # The total is pooch's to set; without one a bar has no truth value, which pooch asks for.
    with tqdm(
        desc=label, total=1, unit="B", unit_scale=True, leave=False, disable=not looking
    ) as bar:
        shown: Any = bar if looking else False  # pooch says bool, and takes any bar
        fetch = pooch.HTTPDownloader(progressbar=shown, chunk_size=2**16, timeout=TIMEOUT)
        fetch(url, content, None)
    return content.getvalue()


def _reason(error: Exception) -> str:
    import requests

    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT:.0f} s"
    if type(error) is requests.ConnectionError:
        return "no connection"
    return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _writable(name: str, target: Path) -> None:
    """Refuse to fetch what could not be kept; writes nothing yet."""
    there = next(path for path in target.parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(_UNWRITABLE.format(name=name, folder=there, reason="no permission"))


def _keep(name: str, target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(content)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(_UNWRITABLE.format(name=name, folder=target.parent, reason=reason)) from None


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
