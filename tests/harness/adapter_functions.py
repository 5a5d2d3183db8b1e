"""Table of the public functions of decoupled jobs, Flax, membership and measurement."""

import functools
import itertools
import tempfile

import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness.bad_arguments import TEXTS, numbers_in

import localsgd_jax as lsgd
from localsgd_jax import decoupled
from localsgd_jax.checkpoint import RunCheckpointer
from localsgd_jax.fault_tolerance import Membership
from localsgd_jax.flax import from_nnx, update_nnx

POSITIVE = tuple(x for x in numbers_in(0, 1e31) if x != "minus one")
NONE = ("none",)
FUNCTION = ("function", "class")
COUNTS = decoupled.Counts(4, 32, 320)
ALGORITHM = lsgd.local_sgd(lambda w, b: ((w["w"] - b) ** 2).mean(), optax.sgd(0.1))
PARAMS = {"w": jnp.zeros(())}
# Trees of arrays that a train state or a model may consist of.
TREE = ("dict", "list", "array", "half", "minus one", "large float", "true", "complex")
TREE = (*TREE, "nan", "inf", "minus inf")


def batches(learner, start):
    return itertools.repeat(np.ones((1, 2)))


JOB = {
    "algorithm": ALGORITHM,
    "params": PARAMS,
    "batches": batches,
    "every": 2,
    "steps": 4,
    "merge": decoupled.immediate(),
    "outer": None,
    "field": "params",
    "fragments": 1,
    "compress": decoupled.full_precision(),
    "overlap": 0,
    "exchanges": 1,
    "tokens": None,
    "cluster": None,
}


def job():
    return decoupled.Job(**JOB)


@functools.cache
def mesh():
    return jax.make_mesh((2,), ("worker",), devices=jax.devices()[:2])


@functools.cache
def cluster():
    algorithm = lsgd.local_sgd(lambda w, b: (w - b) ** 2, optax.sgd(0.1))
    return lsgd.on_mesh(algorithm, mesh())


@functools.cache
def state():
    return cluster().init(jnp.zeros(()))


@functools.cache
def linen_state():
    model = flax.linen.Dense(1)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    return flax.training.train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(0.1)
    )


@functools.cache
def model():
    return nnx.Linear(3, 1, rngs=nnx.Rngs(0))


def nnx_step(model, batch):
    return jnp.mean(model(batch) ** 2)


@functools.cache
def nnx_state():
    return from_nnx(nnx_step, model())[1]


def from_nnx_of_one(train_step, objects, rule, wrt, batch_argnum):
    options = {"rule": rule, "wrt": wrt, "batch_argnum": batch_argnum}
    return from_nnx(train_step, objects, **options)


def update_nnx_of_one(state, objects):
    update_nnx(state, objects)


def restore(state, reset_fields, fallback, changed):
    options = {"reset_fields": reset_fields, "fallback": fallback, "changed": changed}
    with (
        tempfile.TemporaryDirectory() as directory,
        RunCheckpointer(directory, cluster()) as checkpointer,
    ):
        checkpointer.restore(state, **options)


def save(state, examples_seen):
    with (
        tempfile.TemporaryDirectory() as directory,
        RunCheckpointer(directory, cluster()) as checkpointer,
    ):
        checkpointer.save(state, examples_seen)


def sync(state, weight):
    cluster().sync(state, weight)


def run_atomically(call):
    Membership(jax.devices()).run_atomically(call)


TABLE = {
    "decoupled.Job": (
        JOB,
        {
            "params": (*TREE, "huge int"),
            "outer": NONE,
            "tokens": (*NONE, *FUNCTION),
            "cluster": (*NONE, *FUNCTION),
            "batches": FUNCTION,
        },
    ),
    "decoupled.activity": (
        {"history": {"learners": np.ones((2, 1), bool), "seconds": np.arange(2.0)}},
        {},
    ),
    "decoupled.by_examples": ({"counts": COUNTS}, {}),
    "decoupled.by_tokens": ({"counts": COUNTS}, {}),
    "decoupled.by_token_rate": ({"counts": COUNTS}, {}),
    "decoupled.floats": ({"dtype": jnp.bfloat16}, {}),
    "decoupled.immediate": (
        {"aggregation": None, "workers": None},
        {"aggregation": NONE, "workers": NONE},
    ),
    "decoupled.integers": ({"bits": 4, "block": 256}, {}),
    "decoupled.largest": ({"fraction": 0.5, "chunk": 4}, {"fraction": ("half",)}),
    "decoupled.quorum": (
        {"q": 2, "grace": 1.0, "weight": decoupled.by_tokens, "weighting": None},
        {"grace": POSITIVE, "weight": FUNCTION, "weighting": (*NONE, *FUNCTION)},
    ),
    "decoupled.make_syncer": ({"job": job, "fragment": 0}, {}),
    "decoupled.read_log": ({"job": job, "directory": "nowhere"}, {"directory": TEXTS}),
    "decoupled.recompute": ({"job": job, "log": ()}, {}),
    "decoupled.replay": ({"job": job, "log": ()}, {}),
    "decoupled.run": (
        {
            **{"job": job, "learners": 2, "address": None, "resources": None},
            **{"checkpoint": None, "save_every": 200, "restarts": 3, "timeout": 120.0},
            **{"environment": None, "progress": None, "record": None},
            "processes": 1,
        },
        {
            "address": (*NONE, "text"),
            "resources": (*NONE, "dict"),
            "checkpoint": (*NONE, *TEXTS),
            "timeout": POSITIVE,
            "environment": NONE,
            "progress": (*NONE, "true"),
            "record": (*NONE, *FUNCTION),
        },
    ),
    "decoupled.simulate": (
        {"job": job, "clock": decoupled.Clock(1), "log": None},
        {"log": (*NONE, "list")},
    ),
    "fault_tolerance.Membership": (
        {"devices": jax.devices(), "timeout": 60.0, "straggler_timeout": 600.0},
        {"timeout": POSITIVE, "straggler_timeout": POSITIVE},
    ),
    "flax.from_linen": (
        {"train_step": abs, "train_state": linen_state, "rule": None},
        {"train_step": FUNCTION, "train_state": ("dict",), "rule": NONE},
    ),
    "flax.from_nnx": (
        {
            **{"train_step": nnx_step, "objects": model, "rule": None, "wrt": None},
            "batch_argnum": None,
        },
        {
            # Strings, bools, lists, classes and functions are filters of variables.
            "wrt": (*NONE, *FUNCTION, *TEXTS, "true", "list"),
            "train_step": ("function",),
            "rule": NONE,
            "batch_argnum": NONE,
        },
    ),
    "flax.update_nnx": ({"state": nnx_state, "objects": model}, {}),
    "planning.measure": (
        {
            **{"cluster": cluster, "state": state, "batch": jnp.ones(2), "mesh": mesh},
            **{"axis": "worker", "repeats": 1},
        },
        {"batch": ("array",)},
    ),
    "planning.round_seconds": (
        {"cluster": cluster, "state": state, "batch": jnp.ones(2), "repeats": 1},
        {"batch": ("array",)},
    ),
    "planning.all_reduce_seconds": (
        {"mesh": mesh, "axis": "worker", "size": 64, "repeats": 1},
        {},
    ),
}
TABLE |= {
    # Methods.
    "checkpoint.restore": (
        {"state": state, "reset_fields": (), "fallback": False, "changed": ()},
        {
            # Names of fields are compared with those of a checkpoint.
            "reset_fields": ("list", "dict", "array", "array of text"),
            "fallback": ("true",),
        },
    ),
    "checkpoint.save": ({"state": state, "examples_seen": 0}, {}),
    "fault_tolerance.run_atomically": ({"call": len}, {"call": FUNCTION}),
    "cluster.sync": (
        {"state": state, "weight": None},
        {"weight": (*NONE, "array")},
    ),
}
MADE = (job, cluster, state, mesh, linen_state, model, nnx_state)
WRAPPERS = {
    "checkpoint.restore": restore,
    "checkpoint.save": save,
    "cluster.sync": sync,
    "fault_tolerance.run_atomically": run_atomically,
    "flax.from_nnx": from_nnx_of_one,
    "flax.update_nnx": update_nnx_of_one,
}
