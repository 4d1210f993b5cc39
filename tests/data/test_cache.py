"""Files of data sets: found, checked, fetched, kept whole, and told of when they are not."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import requests

from ppl_models.data import cache, images, load, text
from ppl_models.data.cache import File, digest, fingerprint, folder, read, read_arrays

CONTENT = b"what was published" * 1000
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
ARRAYS = {"x": np.arange(6, dtype=np.uint8).reshape(2, 3), "words": np.array(["a", "bc"])}


@dataclass
class Server:
    """Answers requests on this machine."""

    address: str
    body: bytes = CONTENT
    status: int = 200
    cut: bool = False
    silent: bool = False
    asked: list[str] = field(default_factory=list)

    def file(self, digests: tuple[str, ...] = (SHA256,), place: str = "set/file.bin") -> File:
        return File(place, f"{self.address}/{place}", digests)


@pytest.fixture
def server() -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            if state.silent:
                time.sleep(1.0)
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            with suppress(ConnectionError):  # whoever asked has given up
                self.wfile.write(state.body[: len(state.body) // 2] if state.cut else state.body)

        def log_message(self, format, *arguments) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        state = Server(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        http.shutdown()
        thread.join(5)


def nowhere(digests: tuple[str, ...] = (SHA256,)) -> File:
    return File("set/file.bin", "http://127.0.0.1:9/file.bin", digests)  # nobody listens there


def names(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def test_the_variable_moves_the_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path))
    assert folder() == tmp_path
    monkeypatch.setenv("PPL_MODELS_DATA", "~/data")
    assert folder() == Path.home() / "data"
    for unset in (lambda: monkeypatch.setenv("PPL_MODELS_DATA", ""), monkeypatch.undo):
        unset()
        if not os.environ.get("PPL_MODELS_DATA"):
            assert folder().name == "ppl-models"


def test_a_file_is_fetched_once_and_kept(server, empty_cache) -> None:
    assert read("set", [server.file()]) == [CONTENT]
    assert names(empty_cache) == ["set/file.bin"]
    assert (empty_cache / "set/file.bin").read_bytes() == CONTENT
    assert read("set", [server.file()]) == [CONTENT]
    assert server.asked == ["/set/file.bin"]


def test_others_may_read_what_was_kept(server, empty_cache) -> None:
    read("set", [server.file()])
    mask = os.umask(0)
    os.umask(mask)
    assert (empty_cache / "set/file.bin").stat().st_mode & 0o777 == 0o666 & ~mask


def test_any_of_the_digests_will_do(server, empty_cache) -> None:
    other = "md5:" + "0" * 32
    assert read("set", [server.file((other, SHA256))]) == [CONTENT]
    git = f"git:{digest(CONTENT, 'git')}"
    assert read("set", [server.file((git,))]) == [CONTENT]
    # As `git hash-object` says of a file of six bytes.
    assert digest(b"hello\n", "git") == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b"?" + b[1:], lambda b: b""])
def test_a_corrupt_file_is_told_and_fetched_again(server, empty_cache, spoil) -> None:
    path = empty_cache / "set/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(spoil(CONTENT))
    said = rf"^set: {re.escape(str(path))} is corrupt: expected {SHA256}, got sha256:[0-9a-f]+ "
    with pytest.warns(UserWarning, match=said + r".* fetched again from http[^\n]*$"):
        assert read("set", [server.file()]) == [CONTENT]
    assert names(empty_cache) == ["set/file.bin"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("set", [server.file()]) == [CONTENT]
    assert len(server.asked) == 1


def test_a_corrupt_file_that_cannot_be_fetched_again_is_left_and_told(empty_cache) -> None:
    path = empty_cache / "set/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    said = rf"^set: cannot fetch http\S+ \(no connection\)\. The file at {re.escape(str(path))} is "
    with (
        pytest.warns(UserWarning, match="corrupt"),
        pytest.raises(OSError, match=said + r"corrupt\. Put the file at [^\n]*$"),
    ):
        read("set", [nowhere()])
    assert path.read_bytes() == b"mine"


def test_offline_says_the_address_and_where_to_put_the_file(empty_cache) -> None:
    path = re.escape(str(empty_cache / "set/file.bin"))
    said = (
        r"^set: cannot fetch http://127\.0\.0\.1:9/file\.bin \(no connection\)\. Put the file at "
        rf"{path}, or set PPL_MODELS_DATA to a folder that has set/file\.bin\.$"
    )
    with pytest.raises(OSError, match=said):
        read("set", [nowhere()])
    with pytest.raises(OSError, match=rf"Put the file at {path} and the other 2 beside it, or"):
        read("set", [nowhere()] * 3)
    assert not empty_cache.exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (requests.ConnectionError("HTTPSConnectionPool(\n...)"), "no connection"),
        (requests.ReadTimeout("slow"), "no answer within 30 s"),
        (requests.exceptions.SSLError("bad\ncertificate"), "SSLError: bad certificate"),
        (OSError(28, "No space left"), r"OSError: \[Errno 28\] No space left"),
    ],
)
def test_every_failure_of_a_network_is_one_line(empty_cache, monkeypatch, error, reason) -> None:
    def fails(url, label) -> bytes:
        raise error

    monkeypatch.setattr(cache, "_download", fails)
    with pytest.raises(OSError, match=rf"^set: cannot fetch \S+ \({reason}\)\. [^\n]*$"):
        read("set", [nowhere()])


def test_a_fault_of_ours_is_not_called_a_fault_of_the_network(empty_cache, monkeypatch) -> None:
    def fails(url, label) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(cache, "_download", fails)
    with pytest.raises(ZeroDivisionError):
        read("set", [nowhere()])


def test_an_answer_that_is_not_the_file_is_refused_and_not_kept(server, empty_cache) -> None:
    server.body = b"<html>Please log in</html>"
    with pytest.raises(
        OSError, match=r"set: http\S+ does not hold what it should: expected sha256"
    ):
        read("set", [server.file()])
    server.status = 404
    with pytest.raises(OSError, match=r"cannot fetch http\S+ \(HTTP 404 Not Found\)"):
        read("set", [server.file()])
    assert not empty_cache.exists()


def test_a_download_that_breaks_off_leaves_nothing_behind(server, empty_cache) -> None:
    server.cut = True
    with pytest.raises(OSError, match=r"set: cannot fetch http\S+ \(.*\)\. Put the file at"):
        read("set", [server.file()])
    assert not empty_cache.exists()


def test_a_server_that_does_not_answer_is_given_up(server, empty_cache, monkeypatch) -> None:
    monkeypatch.setattr(cache, "TIMEOUT", 0.2)
    server.silent = True
    with pytest.raises(OSError, match=r"\(no answer within 0 s\)"):
        read("set", [server.file()])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_write_that_is_stopped_leaves_the_old_file(
    server, empty_cache, monkeypatch, stop
) -> None:
    path = empty_cache / "set/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    half = Path.write_bytes

    def stops(self, content) -> None:
        half(self, content[:5])
        raise stop

    monkeypatch.setattr(Path, "write_bytes", stops)
    said = None if stop is KeyboardInterrupt else "cannot write to .*No space.*PPL_MODELS_DATA"
    with (
        pytest.warns(UserWarning, match="corrupt"),
        pytest.raises((KeyboardInterrupt, OSError), match=said),
    ):
        read("set", [server.file()])
    assert names(empty_cache) == ["set/file.bin"]
    assert path.read_bytes() == b"old"


def test_a_file_takes_its_place_in_one_step(server, empty_cache, monkeypatch) -> None:
    path = empty_cache / "set/file.bin"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    seen = []

    def replaces(source, target) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent))
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", replaces)
    with pytest.warns(UserWarning, match="corrupt"), pytest.raises(OSError, match="cannot write"):
        read("set", [server.file()])
    assert seen == [(CONTENT, b"old", path.parent)]  # whole, and in the same folder
    assert names(empty_cache) == ["set/file.bin"]


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_fetched(
    server, tmp_path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path / "file" / "cache"))
    said = r"^set: cannot write to \S+/file \(.*\)\. Set PPL_MODELS_DATA to a folder that can be "
    with pytest.raises(OSError, match=said):
        read("set", [server.file()])
    monkeypatch.setenv("PPL_MODELS_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=r"^set: cannot write to"):
        read("set", [server.file()])
    with pytest.raises(OSError, match=r"^set: cannot write to"):
        arrays_of(server)
    assert server.asked == []


def test_nothing_is_written_when_the_files_are_there(server, empty_cache, monkeypatch) -> None:
    read("set", [server.file()])
    packed = arrays_of(server)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as a user of a shared cache
    monkeypatch.setattr(cache, "_keep", None)
    assert read("set", [server.file()]) == [CONTENT]
    np.testing.assert_equal(arrays_of(server), packed)


def arrays_of(server: Server, convert=lambda contents: ARRAYS) -> dict[str, np.ndarray]:
    return read_arrays(
        "set", "set/set.npz", fingerprint(ARRAYS), tuple(ARRAYS), (server.file(),), convert
    )


def test_arrays_are_made_once_and_the_originals_are_not_kept(server, empty_cache) -> None:
    seen = []

    def convert(contents: list[bytes]) -> dict[str, np.ndarray]:
        seen.append(contents)
        return ARRAYS

    for _ in range(2):
        np.testing.assert_equal(arrays_of(server, convert), ARRAYS)
    assert seen == [[CONTENT]]
    assert names(empty_cache) == ["set/set.npz"]


def test_originals_in_the_cache_are_used_and_left_there(server, empty_cache, monkeypatch) -> None:
    (empty_cache / "set").mkdir(parents=True)
    (empty_cache / "set/file.bin").write_bytes(CONTENT)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    np.testing.assert_equal(arrays_of(server), ARRAYS)
    assert names(empty_cache) == ["set/file.bin", "set/set.npz"]
    # A folder that cannot be written: they are read each time.
    (empty_cache / "set/set.npz").unlink()

    def refuses(self, content) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuses)
    np.testing.assert_equal(arrays_of(server), ARRAYS)
    assert names(empty_cache) == ["set/file.bin"]
    assert server.asked == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:],
        lambda b: b"no zip at all",
    ],
)
def test_corrupt_arrays_are_told_and_made_again(server, empty_cache, spoil) -> None:
    arrays_of(server)
    path = empty_cache / "set/set.npz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"^set: \S+set\.npz is corrupt: expected content sha256"):
        np.testing.assert_equal(arrays_of(server), ARRAYS)
    np.testing.assert_equal(arrays_of(server), ARRAYS)


def test_arrays_of_another_content_are_corrupt(server, empty_cache) -> None:
    (empty_cache / "set").mkdir(parents=True)
    np.savez(empty_cache / "set/set.npz", x=ARRAYS["x"] + 1, words=ARRAYS["words"])
    with pytest.warns(UserWarning, match="corrupt"):
        np.testing.assert_equal(arrays_of(server), ARRAYS)


def test_pickles_are_not_read(server, empty_cache) -> None:
    (empty_cache / "set").mkdir(parents=True)
    words = np.array(["a", "bc"], dtype=object)
    np.savez(empty_cache / "set/set.npz", x=ARRAYS["x"], words=words)
    with pytest.warns(UserWarning, match=r"cannot be read \(ValueError: .*allow_pickle=False"):
        np.testing.assert_equal(arrays_of(server), ARRAYS)


def test_arrays_that_cannot_be_fetched_say_where_either_file_goes(empty_cache) -> None:
    said = r"Put the file at \S+set/file\.bin, or set PPL_MODELS_DATA to a folder that has set/set"
    with pytest.raises(OSError, match=said):
        read_arrays("set", "set/set.npz", "content sha256:0", ("x",), (nowhere(),), dict)


def test_originals_of_another_content_are_refused(server, empty_cache) -> None:
    def wrong(contents: list[bytes]) -> dict[str, np.ndarray]:
        return {**ARRAYS, "x": ARRAYS["x"] + 1}

    def broken(contents: list[bytes]) -> dict[str, np.ndarray]:
        raise ValueError("no table")

    for convert, got in ((wrong, "content sha256"), (broken, "what cannot be read .*no table")):
        with pytest.raises(OSError, match=rf"set: http\S+ does not hold .*, got {got}"):
            arrays_of(server, convert)
    assert not empty_cache.exists()
    (empty_cache / "set").mkdir(parents=True)
    (empty_cache / "set/file.bin").write_bytes(CONTENT)
    with pytest.raises(OSError, match=r"set: \S+cache/set/file.bin does not hold"):
        arrays_of(server, wrong)


def test_a_fingerprint_is_of_content_and_not_of_its_width() -> None:
    same = {"words": ARRAYS["words"].astype("U9"), "x": np.asfortranarray(ARRAYS["x"], dtype=">i4")}
    assert fingerprint(same) == fingerprint(ARRAYS)
    others = (
        {**ARRAYS, "x": ARRAYS["x"].T},
        {**ARRAYS, "x": ARRAYS["x"].astype(float)},
        {**ARRAYS, "words": np.array(["ab", "c"])},
        {"y": ARRAYS["x"], "words": ARRAYS["words"]},
    )
    assert len({fingerprint(arrays) for arrays in (ARRAYS, *others)}) == 5


def test_a_bar_is_shown_on_a_terminal_only(server, empty_cache, monkeypatch, capsys) -> None:
    read("set", [server.file()])
    assert capsys.readouterr().err == ""
    (empty_cache / "set/file.bin").unlink()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert read("set", [server.file()]) == [CONTENT]
    assert "set: file.bin" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("mnist", r"train-images-idx3-ubyte\.gz and the other 3 beside it"),
        ("binarized_mnist", r"binarized_mnist_train\.amat and the other 2 beside it"),
        ("uci/boston", r"uci_regression/boston/data\.txt and the other 42 beside it"),
        ("newsgroups", r"text_20ng/vocab\.pkl and the other 10 beside it"),
        ("omniglot", r"omniglot/chardata\.mat, or"),
        ("olivetti", r"olivetti/olivettifaces\.mat, or"),
        ("frey_faces", r"frey_faces/frey_rawface\.mat, or"),
        ("fashion_mnist", r"fashion_mnist/train-images-idx3-ubyte\.gz and"),
        ("reuters", r"text_reuters/reuters\.ldac and the other 1 beside it"),
        ("oil_flow", r"oil_flow/3Class\.mat, or"),
        ("german_credit", r"german_credit/german\.data-numeric, or"),
    ],
)
def test_every_data_set_offline_is_one_line(empty_cache, monkeypatch, name, named) -> None:
    def fails(url, label) -> bytes:
        raise requests.ConnectionError

    monkeypatch.setattr(cache, "_download", fails)
    said = (
        rf"^{name}: cannot fetch https://\S+ \(no connection\)\. Put the file at \S+{named}[^\n]*$"
    )
    with pytest.raises(OSError, match=said):
        load(name)
    assert not empty_cache.exists()


def test_every_published_digest_is_one() -> None:
    known = [*images._MNIST, *images._FASHION, *images._BINARIZED, *text._REUTERS]
    known += [images._OMNIGLOT, images._OLIVETTI, images._FREY]
    for file in known:
        assert file.digests
        for algorithm, _, value in (said.partition(":") for said in file.digests):
            assert len(bytes.fromhex(value)) == {"md5": 16, "git": 20, "sha256": 32}[algorithm]
