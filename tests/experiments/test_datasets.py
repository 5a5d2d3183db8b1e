"""LIBSVM files and registered datasets."""

import bz2
import contextlib
import gc
import gzip
import hashlib
import http.server
import lzma
import os
import pathlib
import threading

import numpy as np
import pytest
from harness.experiment_files import require_dataset
from harness.selection import in_full

from localsgd_jax.experiments import datasets
from localsgd_jax.experiments.libsvm import read_libsvm

GOOD = b"# a comment\n+1 1:0.5 3:-2\n\n-1 2:1e-3\n+1\n"
FEATURES = [[0.5, 0, -2], [0, 1e-3, 0], [0, 0, 0]]
LABELS = [1, -1, 1]


def write(directory, content, name="data.txt"):
    path = directory / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ],
)
def test_plain_and_compressed_files(tmp_path, suffix, compress):
    path = write(tmp_path, compress(GOOD), f"data{suffix}")
    features, labels = read_libsvm(path)
    np.testing.assert_array_equal(features.toarray(), FEATURES)
    np.testing.assert_array_equal(labels, LABELS)


def test_indices_may_start_at_zero(tmp_path):
    features, _ = read_libsvm(write(tmp_path, b"1 0:5 2:7\n-1 1:6\n"))
    np.testing.assert_array_equal(features.toarray(), [[5, 0, 7], [0, 6, 0]])


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"abc 1:1", "float"),
        (b"1,2 1:1", "float"),
        (b"1 1:x", "float"),
        (b"1 1:", "float"),
        (b"1 1:2:3", "float"),
        (b"1 7", "unpack"),
        (b"1 a:1", "int"),
        (b"1 -3:1", "Invalid index -3"),
        (b"1 3:1 2:1", "sorted and unique"),
        (b"1 2:1 2:1", "sorted and unique"),
        (b"1 99999999999:1", "too large"),
        (b"\x89PNG\r\x1a\x00\xff", "float"),
        (b"1 1:nan", "not finite"),
        (b"1 1:-inf", "not finite"),
        (b"1 1:1e39", "not finite"),
        (b"nan 1:1", "not finite"),
        (b"inf 1:1", "not finite"),
    ],
)
def test_bad_line_raises_with_its_number(tmp_path, line, reason):
    path = write(tmp_path, GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=reason) as raised:
        read_libsvm(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 6: ")
    assert "\n" not in message


@pytest.mark.parametrize("number", [1, 2, 499, 500, 501, 999, 1000])
@pytest.mark.parametrize("others_bad", [False, True])
def test_first_bad_line_is_found_at_any_position(tmp_path, number, others_bad):
    lines = [b"1 1:1"] * 1000
    lines[number - 1] = b"1 1:bad"
    if others_bad:
        lines[number:] = [b"worse"] * (1000 - number)
    with pytest.raises(ValueError, match=f", line {number}: .*1:bad"):
        read_libsvm(write(tmp_path, b"\n".join(lines)))


def test_bad_line_of_compressed_file_raises(tmp_path):
    path = write(tmp_path, gzip.compress(GOOD + b"oops\n"), "data.gz")
    with pytest.raises(ValueError, match="line 6: .*oops"):
        read_libsvm(path)


def test_long_bad_line_is_truncated(tmp_path):
    with pytest.raises(ValueError) as raised:
        read_libsvm(write(tmp_path, b"x" * 10_000))
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("empty", b"", "has no examples"),
        ("blank", b"\n\n", "has no examples"),
        ("comments", b"# nothing\n", "has no examples"),
        ("bare", b"1\n-1\n", "all features are 0"),
        ("zeros", b"1 1:0\n-1 2:0\n", "all features are 0"),
        ("tiny", b"1 1:1e-300\n-1 2:0\n", "all features are 0"),
        ("short.gz", gzip.compress(GOOD * 1000)[:-20], "damaged or truncated"),
        ("short.bz2", bz2.compress(GOOD * 1000)[:-20], "damaged or truncated"),
        ("short.xz", lzma.compress(GOOD * 1000)[:-20], "damaged or truncated"),
        ("plain.gz", GOOD, "not compressed"),
        ("plain.bz2", GOOD, "not compressed"),
        ("plain.xz", GOOD, "damaged"),
    ],
)
def test_invalid_files_raise(tmp_path, name, content, reason):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=reason) as raised:
        read_libsvm(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("labels", [[0, 1], [1, 2], [-1, 1], [3.5, 7]])
def test_labels_map_to_signs_in_order(labels):
    low, high = labels
    signs = datasets.to_binary_labels("data.txt", np.array([high, low, low, high]))
    np.testing.assert_array_equal(signs, [1, -1, -1, 1])


@pytest.mark.parametrize(
    "labels, shown",
    [
        ([1, 1], "got 1: 1$"),
        ([3, 1, 2.5], "got 3: 1, 2.5, 3$"),
        (range(20), r"got 20: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"),
    ],
)
def test_wrong_number_of_classes_raises(labels, shown):
    with pytest.raises(ValueError, match=f"^data.txt: .*two classes, {shown}"):
        datasets.to_binary_labels("data.txt", np.array(labels))


def test_loaded_file_has_hash_and_name(tmp_path):
    dataset = datasets.load(str(write(tmp_path, GOOD, "toy.txt")))
    assert dataset.name == "toy"
    assert dataset.sha256 == hashlib.sha256(GOOD).hexdigest()
    assert (dataset.examples, dataset.dimension) == (3, 3)
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_unknown_name_or_directory_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no file 'w9a' .* registered: a9a, w8a"):
        datasets.load("w9a")
    with pytest.raises(IsADirectoryError):
        datasets.load(str(tmp_path))


def test_too_large_dataset_raises(tmp_path):
    path = write(tmp_path, b"1 2000000000:1\n-1 1:1\n")
    with pytest.raises(ValueError, match="at most 4 GiB, got 14.9 GiB"):
        datasets.load(str(path))


def test_digits_are_standardised_and_balanced():
    digits = datasets.digits()
    dense = digits.features.toarray()
    std = dense.std(axis=0)
    np.testing.assert_allclose(dense.mean(axis=0), 0, atol=1e-12)
    assert set(np.round(std, 12)) == {0, 1}
    assert sorted(set(digits.labels)) == [-1, 1]
    assert abs(digits.labels.mean()) < 0.02


# -- Registered datasets -----------------------------------------------------------


@contextlib.contextmanager
def http_server(directory):
    """Serves a directory; yields its address and the requested paths."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=directory)

        def log_message(self, *args):
            requests.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", requests
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """An empty cache, no LOCALSGD_DATA, and a server with the file "toy"."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/toy").write_bytes(GOOD)
    monkeypatch.setattr(
        datasets,
        "REGISTRY",
        {"toy": hashlib.sha256(GOOD).hexdigest(), "gone": "0" * 64},
    )
    monkeypatch.setattr(
        datasets.pooch, "os_cache", lambda name: tmp_path / "cache" / name
    )
    monkeypatch.delenv("LOCALSGD_DATA", raising=False)
    with http_server(tmp_path / "site") as (address, requests):
        monkeypatch.setattr(datasets, "BASE_URL", address)
        yield tmp_path, requests


def test_registered_dataset_is_downloaded_once(offline_cache):
    folder, requests = offline_cache
    first = datasets.load("toy")
    assert datasets.load("toy").name == first.name == "toy"
    assert requests == ["/toy"]
    assert (folder / "cache/localsgd_jax/toy").read_bytes() == GOOD


def test_damaged_cache_is_downloaded_again(offline_cache):
    folder, requests = offline_cache
    datasets.fetch("toy")
    (folder / "cache/localsgd_jax/toy").write_bytes(b"damaged")
    assert datasets.fetch("toy").read_bytes() == GOOD
    assert requests == ["/toy", "/toy"]


def test_download_with_wrong_hash_raises_and_is_removed(offline_cache):
    folder, _ = offline_cache
    (folder / "site/toy").write_bytes(b"1 1:1\n")
    with pytest.raises(OSError, match="does not match the known hash"):
        datasets.fetch("toy")
    assert not list((folder / "cache").rglob("toy"))


# pooch leaves the connection of a failed download to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("unreachable", [False, True])
def test_download_failure_names_alternatives(offline_cache, monkeypatch, unreachable):
    folder, _ = offline_cache
    if unreachable:
        monkeypatch.setattr(datasets, "BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(OSError) as raised:
        datasets.fetch("gone")
    gc.collect()
    message = str(raised.value)
    assert ("refused" if unreachable else "404") in message
    assert datasets.BASE_URL + "gone" in message
    assert str(folder / "cache/localsgd_jax/gone") in message
    assert "LOCALSGD_DATA" in message and "0" * 64 in message
    assert "\n" not in message


def test_data_directory_takes_precedence(offline_cache, monkeypatch):
    folder, requests = offline_cache
    (folder / "own_file").mkdir()
    monkeypatch.setenv("LOCALSGD_DATA", str(folder / "own_file"))
    assert datasets.fetch("toy").parent.name == "localsgd_jax"
    own_file = write(folder / "own_file", GOOD, "toy")
    assert datasets.fetch("toy") == own_file
    assert requests == ["/toy"]


def test_data_directory_is_verified(offline_cache, monkeypatch):
    folder, _ = offline_cache
    monkeypatch.setenv("LOCALSGD_DATA", str(folder / "missing"))
    with pytest.raises(OSError, match="LOCALSGD_DATA: no directory"):
        datasets.fetch("toy")
    (folder / "missing").mkdir()
    write(folder / "missing", b"1 1:1\n", "toy")
    with pytest.raises(ValueError, match="sha256 must be"):
        datasets.fetch("toy")


def test_registered_name_takes_precedence(offline_cache, monkeypatch):
    folder, _ = offline_cache
    write(folder, b"7 1:1\n8 1:2\n", "toy")
    monkeypatch.chdir(folder)
    assert datasets.load("toy").examples == 3
    assert datasets.load("./toy").examples == 2


@pytest.mark.parametrize(
    "name, examples, dimension, positive",
    [in_full("w8a", 49749, 300, 1479), ("a9a", 32561, 123, 7841)],
)
def test_registered_datasets(name, examples, dimension, positive):
    require_dataset(name)
    dataset = datasets.load(name)
    assert (dataset.examples, dataset.dimension) == (examples, dimension)
    assert int(np.sum(dataset.labels == 1)) == positive
    assert pathlib.Path(os.environ["LOCALSGD_DATA"], name).exists()
