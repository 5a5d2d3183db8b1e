"""Writers of history rows: files, and the loggers of other libraries."""

import json
import math
import sys
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import localsgd_jax as lsgd
from localsgd_jax import reporting

ROWS = [
    {"step": 4, "round": 1, "loss": 0.5, "wait_seconds": np.array([0.0, math.nan])},
    {"step": 8, "round": 2, "loss": np.float32(0.25), "accuracy": jnp.float32(0.5)},
]


def test_json_lines(tmp_path):
    path = tmp_path / "history.jsonl"
    for row in ROWS:
        reporting.to_jsonl(path)(row)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 4, "round": 1, "loss": 0.5, "wait_seconds": [0.0, None]},
        {"step": 8, "round": 2, "loss": 0.25, "accuracy": 0.5},
    ]


def test_csv_adds_columns_and_continues_a_file(tmp_path):
    path = tmp_path / "history.csv"
    for row in ROWS:
        reporting.to_csv(path)(row)
    assert path.read_text().splitlines() == [
        "step,round,loss,wait_seconds.0,wait_seconds.1,accuracy",
        "4,1,0.5,0,,",
        "8,2,0.25,,,0.5",
    ]


def test_files_are_read_as_the_same_run(tmp_path):
    write = reporting.to_all(
        reporting.to_jsonl(tmp_path / "a.jsonl"), reporting.to_csv(tmp_path / "a.csv")
    )
    for row in ROWS:
        write(row)
    one, other = (reporting.read_run(tmp_path / f"a.{x}") for x in ("jsonl", "csv"))
    assert one.columns.keys() == other.columns.keys()
    for name, values in one.columns.items():
        np.testing.assert_array_equal(values, other.columns[name])


def test_history_of_train_equals_its_record(tmp_path):
    algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.5))
    cluster = lsgd.simulate(algorithm, workers=2)
    _, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(())),
        [jnp.array([1.0, 3.0])] * 6,
        schedule=2,
        evaluate=lambda w: {"error": w},
        evaluate_every=2,
        on_round_end=reporting.to_run_directory(tmp_path / "run", {"rule": every}),
        progress=False,
    )
    run = reporting.read_run(tmp_path / "run")
    assert run.config["rule"] == "every" and run.config["versions"]["optax"]
    assert run.columns.keys() == history.keys()
    for name, values in history.items():
        np.testing.assert_allclose(run.columns[name], values)


class Named:
    """Value without a form in JSON."""

    def __repr__(self):
        return "every"


every = Named()


def test_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    event = pytest.importorskip("tensorboardX.proto.event_pb2")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        for row in ROWS:
            reporting.to_tensorboard(writer)(row)
    (path,) = tmp_path.iterdir()
    found = {
        (entry.step, value.tag): value.simple_value
        for content in read_records(path.read_bytes())
        for entry in [event.Event.FromString(content)]
        for value in entry.summary.value
    }
    assert found == {
        **{(4, "round"): 1.0, (4, "loss"): 0.5, (4, "wait_seconds.0"): 0.0},
        **{(8, "round"): 2.0, (8, "loss"): 0.25, (8, "accuracy"): 0.5},
    }


def read_records(data):
    """Yields the contents of a TFRecord file: length, checksum, content, checksum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(project="test", dir=str(tmp_path), mode="offline")
    for row in ROWS:
        reporting.to_wandb(run)(row)
    run.finish()
    (path,) = tmp_path.rglob("run-*.wandb")
    texts = (b"loss", b"0.25", b"accuracy", b"wait_seconds.0")
    # Another process writes the file, perhaps after `finish` has returned.
    deadline = time.monotonic() + 60
    while not all(text in path.read_bytes() for text in texts):
        assert time.monotonic() < deadline, path.read_bytes()
        time.sleep(0.1)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clu_writers(monkeypatch, caplog):
    """The package of CLU's writers imports TensorFlow, which these do not use."""
    pytest.importorskip("clu")
    for name in ("tensorflow", "tensorboard.plugins.hparams"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock())
    from clu.metric_writers.logging_writer import LoggingWriter
    from clu.metric_writers.multi_writer import MultiWriter

    with caplog.at_level("INFO", logger="absl"):
        for row in ROWS:
            reporting.to_clu(MultiWriter([LoggingWriter()]))(row)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "[4] loss=0.5, round=1, wait_seconds.0=0"
    assert second == "[8] accuracy=0.5, loss=0.25, round=2"


@pytest.mark.parametrize("name", ["to_tensorboard", "to_wandb", "to_clu"])
def test_other_objects_raise(name):
    with pytest.raises(TypeError, match=rf"{name}\(\w+\): \w+ must have a method"):
        getattr(reporting, name)(object())


@pytest.mark.parametrize(
    "to_file, name, text",
    [
        (reporting.to_jsonl, "run.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "lo'),
        (reporting.to_csv, "run.csv", "step,loss\n1,0.5\n2,0."),
    ],
)
def test_a_cut_last_line_is_not_continued(to_file, name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    np.testing.assert_array_equal(reporting.read_run(path).columns["loss"], [0.5])
    write = to_file(path)
    write({"step": 2, "loss": 0.25})
    columns = reporting.read_run(path).columns
    np.testing.assert_array_equal(columns["step"], [1, 2])
    np.testing.assert_array_equal(columns["loss"], [0.5, 0.25])


@pytest.mark.parametrize("to_file", [reporting.to_jsonl, reporting.to_csv])
def test_rows_without_real_numbers_raise(to_file, tmp_path):
    write = to_file(tmp_path / "file")
    with pytest.raises(ValueError, match="'loss' must be a real number .* got 1j"):
        write({"step": 1, "loss": 1j})
    with pytest.raises(TypeError, match="row must be a mapping, got 3"):
        write(3)
