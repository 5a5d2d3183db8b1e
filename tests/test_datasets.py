"""LIBSVM files and known data sets: read whole, or refused with the reason."""

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
def test_files_are_read_compressed_or_not(tmp_path, suffix, compress):
    path = write(tmp_path, compress(GOOD), f"data{suffix}")
    features, labels = read_libsvm(path)
    np.testing.assert_array_equal(features.toarray(), FEATURES)
    np.testing.assert_array_equal(labels, LABELS)


def test_indices_may_count_from_zero(tmp_path):
    features, _ = read_libsvm(write(tmp_path, b"1 0:5 2:7\n-1 1:6\n"))
    np.testing.assert_array_equal(features.toarray(), [[5, 0, 7], [0, 6, 0]])


@pytest.mark.parametrize(
    "line, why",
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
def test_a_bad_line_is_named_with_its_number(tmp_path, line, why):
    path = write(tmp_path, GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match=why) as raised:
        read_libsvm(path)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 6: ")
    assert "\n" not in message


@pytest.mark.parametrize("number", [1, 2, 499, 500, 501, 999, 1000])
@pytest.mark.parametrize("more", [False, True])
def test_the_first_bad_line_is_found_anywhere(tmp_path, number, more):
    lines = [b"1 1:1"] * 1000
    lines[number - 1] = b"1 1:bad"
    if more:
        lines[number:] = [b"worse"] * (1000 - number)
    with pytest.raises(ValueError, match=f", line {number}: .*1:bad"):
        read_libsvm(write(tmp_path, b"\n".join(lines)))


def test_the_bad_line_of_a_compressed_file_is_found(tmp_path):
    path = write(tmp_path, gzip.compress(GOOD + b"oops\n"), "data.gz")
    with pytest.raises(ValueError, match="line 6: .*oops"):
        read_libsvm(path)


def test_a_long_bad_line_is_shortened(tmp_path):
    with pytest.raises(ValueError) as raised:
        read_libsvm(write(tmp_path, b"x" * 10_000))
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("empty", b"", "no examples"),
        ("blank", b"\n\n", "no examples"),
        ("comments", b"# nothing\n", "no examples"),
        ("bare", b"1\n-1\n", "no example has a feature"),
        ("zeros", b"1 1:0\n-1 2:0\n", "no example has a feature"),
        ("tiny", b"1 1:1e-300\n-1 2:0\n", "no example has a feature"),
        ("short.gz", gzip.compress(GOOD * 1000)[:-20], "damaged or cut short"),
        ("short.bz2", bz2.compress(GOOD * 1000)[:-20], "damaged or cut short"),
        ("short.xz", lzma.compress(GOOD * 1000)[:-20], "damaged or cut short"),
        ("plain.gz", GOOD, "not compressed"),
        ("plain.bz2", GOOD, "not compressed"),
        ("plain.xz", GOOD, "damaged"),
    ],
)
def test_useless_files_are_refused(tmp_path, name, content, why):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=why) as raised:
        read_libsvm(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize("labels", [[0, 1], [1, 2], [-1, 1], [3.5, 7]])
def test_two_labels_become_signs_in_their_order(labels):
    low, high = labels
    signs = datasets.two_classes("here", np.array([high, low, low, high]))
    np.testing.assert_array_equal(signs, [1, -1, -1, 1])


@pytest.mark.parametrize(
    "labels, shown",
    [
        ([1, 1], "got 1: 1$"),
        ([3, 1, 2.5], "got 3: 1, 2.5, 3$"),
        (range(20), r"got 20: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\.$"),
    ],
)
def test_other_numbers_of_classes_are_refused(labels, shown):
    with pytest.raises(ValueError, match=f"^here: .*two classes, {shown}"):
        datasets.two_classes("here", np.array(labels))


def test_a_file_is_loaded_with_its_hash(tmp_path):
    dataset = datasets.load(str(write(tmp_path, GOOD, "mine.txt")))
    assert dataset.name == "mine"
    assert dataset.sha256 == hashlib.sha256(GOOD).hexdigest()
    assert (dataset.examples, dataset.dimension) == (3, 3)
    np.testing.assert_array_equal(dataset.labels, LABELS)


def test_what_is_neither_file_nor_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="no file 'w9a', .* known are: a9a, w8a"):
        datasets.load("w9a")
    with pytest.raises(IsADirectoryError):
        datasets.load(str(tmp_path))


def test_what_is_too_large_is_refused_before_memory_is_taken(tmp_path):
    path = write(tmp_path, b"1 2000000000:1\n-1 1:1\n")
    with pytest.raises(ValueError, match="14.9 GiB .* at most 4 GiB"):
        datasets.load(str(path))


def test_digits_are_standardised_and_balanced():
    digits = datasets.digits()
    dense = digits.features.toarray()
    spread = dense.std(axis=0)
    np.testing.assert_allclose(dense.mean(axis=0), 0, atol=1e-12)
    assert set(np.round(spread, 12)) == {0, 1}
    assert sorted(set(digits.labels)) == [-1, 1]
    assert abs(digits.labels.mean()) < 0.02


# -- Known data sets ---------------------------------------------------------------


@contextlib.contextmanager
def site(directory):
    """Serves a directory on this machine; yields its address and what was asked."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=directory)

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def away(tmp_path, monkeypatch):
    """A cache of its own, no LOCALSGD_DATA, a site that serves "toy"."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/toy").write_bytes(GOOD)
    monkeypatch.setattr(
        datasets, "KNOWN", {"toy": hashlib.sha256(GOOD).hexdigest(), "gone": "0" * 64}
    )
    monkeypatch.setattr(
        datasets.pooch, "os_cache", lambda name: tmp_path / "cache" / name
    )
    monkeypatch.delenv("LOCALSGD_DATA", raising=False)
    with site(tmp_path / "site") as (address, asked):
        monkeypatch.setattr(datasets, "SITE", address)
        yield tmp_path, asked


def test_a_known_data_set_is_downloaded_once(away):
    home, asked = away
    first = datasets.load("toy")
    assert datasets.load("toy").name == first.name == "toy"
    assert asked == ["/toy"]
    assert (home / "cache/localsgd_jax/toy").read_bytes() == GOOD


def test_a_damaged_cache_is_downloaded_anew(away):
    home, asked = away
    datasets.fetch("toy")
    (home / "cache/localsgd_jax/toy").write_bytes(b"damaged")
    assert datasets.fetch("toy").read_bytes() == GOOD
    assert asked == ["/toy", "/toy"]


def test_a_download_with_a_wrong_hash_is_refused_and_not_kept(away):
    home, _ = away
    (home / "site/toy").write_bytes(b"1 1:1\n")
    with pytest.raises(OSError, match="does not match the known hash"):
        datasets.fetch("toy")
    assert not list((home / "cache").rglob("toy"))


# pooch leaves the connection of a failed download to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("unreachable", [False, True])
def test_without_a_download_the_way_out_is_said(away, monkeypatch, unreachable):
    home, _ = away
    if unreachable:
        monkeypatch.setattr(datasets, "SITE", "http://127.0.0.1:9/")
    with pytest.raises(OSError) as raised:
        datasets.fetch("gone")
    gc.collect()
    message = str(raised.value)
    assert ("refused" if unreachable else "404") in message
    assert datasets.SITE + "gone" in message
    assert str(home / "cache/localsgd_jax/gone") in message
    assert "LOCALSGD_DATA" in message and "0" * 64 in message
    assert "\n" not in message


def test_the_directory_of_the_user_comes_first(away, monkeypatch):
    home, asked = away
    (home / "mine").mkdir()
    monkeypatch.setenv("LOCALSGD_DATA", str(home / "mine"))
    assert datasets.fetch("toy").parent.name == "localsgd_jax"
    mine = write(home / "mine", GOOD, "toy")
    assert datasets.fetch("toy") == mine
    assert asked == ["/toy"]


def test_the_directory_of_the_user_is_checked(away, monkeypatch):
    home, _ = away
    monkeypatch.setenv("LOCALSGD_DATA", str(home / "missing"))
    with pytest.raises(OSError, match="LOCALSGD_DATA: no directory"):
        datasets.fetch("toy")
    (home / "missing").mkdir()
    write(home / "missing", b"1 1:1\n", "toy")
    with pytest.raises(ValueError, match="sha256 must be"):
        datasets.fetch("toy")


def test_a_known_name_wins_over_a_file_of_that_name(away, monkeypatch):
    home, _ = away
    write(home, b"7 1:1\n8 1:2\n", "toy")
    monkeypatch.chdir(home)
    assert datasets.load("toy").examples == 3
    assert datasets.load("./toy").examples == 2


@pytest.mark.parametrize(
    "name, examples, dimension, positive",
    [("w8a", 49749, 300, 1479), ("a9a", 32561, 123, 7841)],
)
def test_the_real_ones_are_what_they_are(name, examples, dimension, positive):
    if "LOCALSGD_DATA" not in os.environ:
        pytest.skip("LOCALSGD_DATA is not set")
    dataset = datasets.load(name)
    assert (dataset.examples, dataset.dimension) == (examples, dimension)
    assert int(np.sum(dataset.labels == 1)) == positive
    assert pathlib.Path(os.environ["LOCALSGD_DATA"], name).exists()
