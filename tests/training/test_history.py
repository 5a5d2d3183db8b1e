"""History, evaluation, `on_round_end` and the progress bar."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness.cases import assert_close, batches, cluster, network, run_manually
from harness.selection import in_full

import localsgd_jax as lsgd


def train(cluster, batches, **options):
    """Trains from the network's initial parameters without a progress bar."""
    options = {"schedule": 2, "progress": False} | options
    return lsgd.train(cluster, cluster.init(network()), batches, **options)


@pytest.mark.parametrize(
    "schedule",
    [lsgd.every(2), in_full(lsgd.post_local(4, 3))],
    ids=["every", "post_local"],
)
def test_consensus_is_evaluated_every_n_rounds_and_at_the_end(schedule):
    workers = cluster("mesh", "average")
    models = []

    def evaluate(params):
        models.append(params)
        return {"norm": optax.tree.norm(params)}

    _, history = train(
        workers, batches(17), schedule=schedule, evaluate=evaluate, evaluate_every=3
    )
    num_rounds = len(history["round"])
    evaluated = sorted({*range(3, num_rounds + 1, 3), num_rounds})
    rows = np.flatnonzero(~np.isnan(history["norm"]))
    assert rows.tolist() == [r - 1 for r in evaluated]
    for round_number, params in zip(evaluated, models, strict=True):
        step = history["step"][round_number - 1]
        expected, _ = run_manually(workers, batches(17)[:step], schedule)
        if not schedule(int(step)):
            expected = workers.sync(expected)
        assert_close(params, lsgd.consensus(expected), rtol=1e-4, atol=1e-5)


def test_resumed_run_evaluates_at_same_steps():
    workers = cluster("simulate", "average")
    state = workers.init(network())
    rounds = []
    for part in (batches(20)[:8], batches(20)[8:]):
        state, history = lsgd.train(
            workers,
            state,
            part,
            schedule=2,
            evaluate=lambda params: 1.0,
            evaluate_every=3,
            progress=False,
        )
        evaluated = ~np.isnan(history["evaluation"])
        rounds.append(history["round"][evaluated].tolist())
    assert rounds == [[3, 4], [6, 9, 10]]


def test_evaluation_receives_mean_of_different_workers():
    models = []
    state, _ = train(
        cluster("simulate", "identity"),
        batches(3),
        schedule=3,
        evaluate=lambda params: models.append(params) or 0,
    )
    mean = jax.tree.map(lambda x: np.mean(x, axis=0), state.workers.params)
    assert_close(models[0], mean)


def test_single_number_is_called_evaluation():
    workers = cluster("simulate", "average")
    _, history = train(workers, batches(4), evaluate=lambda params: 7)
    assert history["evaluation"].tolist() == [7, 7]


def test_each_row_is_reported_once_in_order():
    rows = []
    _, history = train(
        cluster("simulate", "average"),
        batches(11),
        evaluate=lambda params: {"one": 1.0},
        evaluate_every=2,
        on_round_end=rows.append,
    )
    assert [row["round"] for row in rows] == history["round"].tolist()
    assert ["one" in row for row in rows] == [False, True] * 3
    assert [row["loss"] for row in rows] == history["loss"].tolist()


def test_row_is_reported_before_the_evaluation_of_the_next():
    rows, reported = [], []
    train(
        cluster("simulate", "average"),
        batches(11),
        evaluate=lambda params: reported.append(len(rows)) or 1,
        evaluate_every=10,
        on_round_end=rows.append,
    )
    assert len(rows) == reported[-1] + 1


def test_scalar_metrics_per_worker_become_columns():
    def train_step(state, batch):
        metrics = {
            "loss": batch,
            "more": {"twice": 2 * batch},
            "row": batch * jnp.ones(3),
        }
        return {"params": state["params"] + batch}, metrics

    workers = lsgd.simulate(lsgd.from_train_step(train_step, lsgd.average()), 2)
    _, history = lsgd.train(
        workers,
        workers.init({"params": jnp.zeros(())}),
        [jnp.array([1.0, 3.0])] * 2,
        schedule=2,
        progress=False,
    )
    assert history["loss"].tolist() == [2] and history["more.twice"].tolist() == [4]
    assert "row" not in history


@pytest.mark.parametrize(
    "schedule", [in_full(lsgd.every(1)), lsgd.every(4), lsgd.at_steps([2, 3, 70])]
)
def test_non_finite_loss_names_step_and_workers(schedule):
    poisoned = batches(90)
    for worker in (1, 6):
        poisoned[10][1][worker] = np.nan
    rows = []
    with pytest.raises(lsgd.NonFiniteLossError, match=r"step 11 .*\[1, 6\]") as caught:
        train(
            cluster("lanes", "average"),
            poisoned,
            schedule=schedule,
            on_round_end=rows.append,
            max_steps_per_dispatch=8,
        )
    assert (caught.value.step, caught.value.workers) == (11, [1, 6])
    assert isinstance(caught.value.state, lsgd.State)
    assert caught.value.history["round"].tolist() == [row["round"] for row in rows]
    assert np.isfinite(caught.value.history["loss"]).all()
    assert [row["step"] for row in rows] == schedule.steps(10)


def test_progress_bar_shows_loss_round_and_bytes(capsys):
    train(cluster("simulate", "average"), batches(6), progress=True)
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss=" in shown and "round=3" in shown and "MB=" in shown
