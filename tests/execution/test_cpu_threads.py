"""Warning about too few threads for several CPU devices before JAX 0.12."""

import warnings

import jax
import optax
import pytest
from harness.cases import mesh

import localsgd_jax as lsgd

ALGORITHM = lsgd.local_sgd(lambda w, batch: (w - batch) ** 2, optax.sgd(0.5))


def make_cluster(monkeypatch, threads, version=(0, 10, 2), devices=4):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setenv("NPROC", threads)
    monkeypatch.setattr(jax, "__version_info__", version)
    return lsgd.on_mesh(ALGORITHM, mesh(worker=devices))


@pytest.mark.parametrize("threads", ["1", "7"])
def test_too_few_threads_warn_with_the_line_to_add(monkeypatch, threads):
    line = r'must have 8 threads, got \d; .* os.environ\["NPROC"\] = "8"'
    with pytest.warns(RuntimeWarning, match=line) as caught:
        make_cluster(monkeypatch, threads)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "threads, version, devices",
    [("8", (0, 11, 2), 4), ("1", (0, 12, 0), 4), ("1", (0, 10, 2), 1)],
)
def test_enough_threads_do_not_warn(monkeypatch, threads, version, devices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cluster(monkeypatch, threads, version, devices)


def test_the_affinity_counts_without_the_variable(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    with pytest.warns(RuntimeWarning, match="got 2;"):
        make_cluster(monkeypatch, "")
