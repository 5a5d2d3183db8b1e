"""Table of the public functions with their valid arguments."""

import functools
import os
import tempfile
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import adapter_functions
from harness.bad_arguments import FAMILY, TEXTS, numbers_in

import localsgd_jax as lsgd
from localsgd_jax import (
    analysis,
    asynchronous,
    checkpoint,
    data,
    decoupled,
    distributed,
    execution,
    fault_tolerance,
    flax,
    reporting,
    rules,
    schedules,
    theory,
)
from localsgd_jax.planning import cost_model, measurement

MODULES = {
    "localsgd_jax": lsgd,
    "analysis": analysis,
    "asynchronous": asynchronous,
    "checkpoint": checkpoint,
    "data": data,
    "decoupled": decoupled,
    "distributed": distributed,
    "execution": execution,
    "fault_tolerance": fault_tolerance,
    "flax": flax,
    "reporting": reporting,
    "rules": rules,
    "schedules": schedules,
    "theory": theory,
}
PLANNING = (
    *("all_reduce_time", "exposed_communication_fraction"),
    *("exposed_communication_seconds", "fit_link", "recommend_period"),
    *("period_for_communication_fraction", "round_time", "speedup"),
    *("measure", "round_seconds", "all_reduce_seconds"),
)

TRUTHS = ("true",)
FRACTION = numbers_in(0, 1)
BELOW_ONE = ("half",)
POSITIVE = tuple(x for x in numbers_in(0, 1e31) if x != "minus one")
ANY_NUMBER = numbers_in(-1, 1e31)
NONE = ("none",)
NAME = ("text",)
FUNCTION = ("function", "class")
RATE = (*POSITIVE, *FUNCTION)
TREE = ("dict", "list", "array", "half", "minus one", "large float", "true", "none")
TREE = (*TREE, "complex", "nan", "inf", "minus inf", "huge int")
CONSTANTS = theory.Constants(1.0, 1.0, 1.0, 1.0)
RUN = theory.RunParameters(4, 4, 100)
LINK = cost_model.Link(1e-3, 1e6)
WORKLOAD = cost_model.Workload(2, 0.1, 1000)
RULE = lsgd.average()
OPTIMIZER = optax.sgd(0.1)
ALGORITHM = lsgd.local_sgd(lambda w, b: (w - b) ** 2, OPTIMIZER, RULE)
WRITER = unittest.mock.Mock()
UNUSED = os.path.join(tempfile.gettempdir(), "unused.html")
OPS = (analysis.CollectiveOp("all-reduce", ("f32",), 8, 8.0, ((0, 1),), ("worker",)),)


@functools.cache
def cluster():
    return lsgd.simulate(ALGORITHM, 2)


@functools.cache
def state():
    return cluster().init(jnp.zeros(()))


@functools.cache
def mesh():
    return jax.make_mesh((1,), ("worker",), devices=jax.devices()[:1])


@functools.cache
def process_cluster():
    return execution.on_processes(ALGORITHM, mesh(), 2)


def events():
    return asynchronous.simulate_events(2, 4, 2)


def rule_only(**more):
    return {"rule": RULE} | more


ON_MESH = {
    **{"algorithm": ALGORITHM, "mesh": mesh, "workers": 2, "worker_map": "vmap"},
    **{"axis": "worker", "batch_spec": None},
}
ON_MESH_ACCEPTS = {"workers": NONE, "batch_spec": NONE, "worker_map": NONE}
TRAIN = {
    "cluster": cluster,
    "state": state,
    "batches": lambda: [jnp.ones(2)],
    "schedule": 2,
    "evaluate": None,
    "evaluate_every": 1,
    "eval_fields": "params",
    "on_round_end": None,
    "save": None,
    "save_every": 10,
    "steps": 0,
    "max_steps_per_dispatch": 4,
    "weights": None,
    "progress": None,
}
# Functions and None are valid; a batch may be anything that is iterated.
TRAIN_ACCEPTS = {
    "schedule": FUNCTION,
    "evaluate": (*NONE, *FUNCTION),
    "eval_fields": (*NONE, *NAME),
    "on_round_end": (*NONE, *FUNCTION),
    "save": (*NONE, *FUNCTION),
    "steps": NONE,
    "weights": (*NONE, *FUNCTION, *TEXTS, "array"),
    "progress": (*NONE, *TRUTHS),
    "batches": ("list", "dict", "array", "array of text", *TEXTS, "bytes"),
}
TRAIN_ACCEPTS["batches"] = ("list", "dict", "array", "array of text")
FAULT_TRAIN = {
    name: TRAIN[name] for name in TRAIN if name != "max_steps_per_dispatch"
} | {
    "cluster": process_cluster,
    "state": lambda: process_cluster().init(jnp.zeros(())),
    "round_deadline": 1.0,
    "min_processes": 1,
    "sync_timeout": 1.0,
    "straggler_timeout": 1.0,
    "overlap": False,
}

SECONDS = {
    "overlap": TRUTHS,
    "weights": (*NONE, *TEXTS),
    "round_deadline": (*NONE, *POSITIVE),
    "sync_timeout": POSITIVE,
    "straggler_timeout": POSITIVE,
}

# Functions of name: valid arguments (made by a function where they are costly), and
# for an argument the names of the legitimate values in `bad_arguments.FAMILY`.
TABLE = {
    # Rules.
    "average": ({"axis": None}, {"axis": (*NONE, *NAME)}),
    "cast": (
        rule_only(dtype=jnp.bfloat16),
        {"dtype": ()},
    ),
    "delay": (rule_only(), {}),
    "chunked_top_k": (
        rule_only(k=64, chunk=4096, bits=2, decay=0.95),
        {"bits": NONE, "decay": FRACTION},
    ),
    "clip_to_median_norm": (rule_only(), {}),
    "control_variates": (
        {"learning_rate": 0.1, "period": 4, "rule": RULE},
        {"learning_rate": POSITIVE, "rule": NONE},
    ),
    "desloc": (rule_only(first_moment=3, second_moment=6), {"rule": NONE}),
    "eager_outer": ({"optimizer": OPTIMIZER, "reduce": RULE}, {"reduce": NONE}),
    "partition": (
        {"rules": {"a": RULE}, "labels": lambda path: "a"},
        {"labels": tuple(FAMILY)},
    ),
    "radial_directional_average": (rule_only(), {"rule": NONE}),
    "snoo": (
        {"learning_rate": 0.7, "momentum": 0.5},
        {"learning_rate": RATE, "momentum": BELOW_ONE},
    ),
    "sparseloco": (
        {"learning_rate": 0.7, "decay": 0.95},
        {"learning_rate": RATE, "decay": FRACTION},
    ),
    "weighted_by": (
        {"metric": "tokens", "formula": None},
        {"metric": NAME, "formula": (*NONE, *FUNCTION)},
    ),
    "bind_axis": (
        {"train_step": abs, "axis_name": "batch"},
        {"train_step": FUNCTION, "axis_name": TEXTS},
    ),
    "split_batch": (
        {"batch": np.ones(4), "workers": 2, "drop_remainder": False},
        {"batch": TREE[:-1], "drop_remainder": TRUTHS},
    ),
    "replace_field": (
        {"state": state, "field": "params", "value": 0.0},
        {"value": ("half", "large float", "nan", "inf", "minus inf")},
    ),
    "asynchronous.aligned_nesterov": (
        {"learning_rate": 0.7, "momentum": 0.9, "weighting": None, "align": None},
        {
            **{"learning_rate": POSITIVE, "momentum": BELOW_ONE},
            **{"weighting": (*NONE, *FUNCTION), "align": (*NONE, *FUNCTION)},
        },
    ),
    "asynchronous.cosine_gated_weighting": (
        {"cutoff": 4.0, "decay": 0.1},
        {"cutoff": POSITIVE, "decay": POSITIVE},
    ),
    "asynchronous.align_to_momentum": (
        {
            **{"gradient": 1.0, "momentum": 1.0, "threshold": 0.2},
            **{"max_shrinkage": 0.5, "strength": 1.0, "scale": 1.0},
        },
        {
            **{"gradient": tuple(FAMILY), "momentum": tuple(FAMILY)},
            **{"threshold": POSITIVE, "max_shrinkage": FRACTION},
            **{"strength": ANY_NUMBER, "scale": ANY_NUMBER},
        },
    ),
    "diloco": (
        {"learning_rate": 0.7, "momentum": 0.9},
        {"learning_rate": RATE, "momentum": BELOW_ONE},
    ),
    "drop_outliers": (
        rule_only(threshold=3.0, decay=0.9, warm_up=5),
        {"threshold": POSITIVE, "decay": BELOW_ONE},
    ),
    "elastic_average": (
        {"alpha": 0.1, "beta": 0.9},
        {"alpha": FRACTION, "beta": FRACTION},
    ),
    "ema": (rule_only(decay=0.9), {"decay": BELOW_ONE}),
    "fedadam": (
        {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "tau": 1e-3},
        {"learning_rate": RATE, "b1": BELOW_ONE, "b2": BELOW_ONE, "tau": POSITIVE},
    ),
    "fedavgm": (
        {"learning_rate": 1.0, "momentum": 0.9},
        {"learning_rate": RATE, "momentum": BELOW_ONE},
    ),
    "flatten": (rule_only(), {}),
    "floating_only": (rule_only(), {}),
    "fragment": (
        rule_only(n=2, grouping="bytes", split_axis=None, rounds_per_fragment=1),
        {"grouping": FUNCTION, "split_axis": NONE},
    ),
    "gossip": ({"topology": "ring"}, {}),
    "interpolate": (rule_only(alpha=0.5), {"alpha": FRACTION}),
    "lookahead": ({"slow_step_size": 0.5}, {"slow_step_size": RATE}),
    "merge_batch_stats": (
        {"axis": None, "mean": "mean", "variance": "var"},
        {"axis": (*NONE, *NAME), "mean": TEXTS, "variance": TEXTS},
    ),
    "outer": (
        {"optimizer": OPTIMIZER, "reduce": RULE},
        {"reduce": (*NONE, *NAME)},
    ),
    "overlap": (rule_only(), {}),
    "quantize": (
        rule_only(bits=4, rounding="nearest", block=256, seed=0, encoding="integer"),
        {},
    ),
    "scaled_sign": (rule_only(), {}),
    "shard_state": (rule_only(workers=2), {}),
    "slowmo": (
        {"learning_rate": 1.0, "momentum": 0.7},
        {"learning_rate": RATE, "momentum": BELOW_ONE},
    ),
    "top_k": (rule_only(fraction=0.1), {"fraction": BELOW_ONE}),
    "trimmed_mean": ({"fraction": 0.1}, {}),
    "when": ({"schedule": lsgd.every(2), "rule": RULE}, {"schedule": FUNCTION}),
    "with_diagnostics": (rule_only(), {}),
    # Schedules.
    "adacomm": ({"h": 8, "min_period": 1, "factor": 0.5}, {"factor": BELOW_ONE}),
    "at_steps": ({"steps": [2, 3]}, {}),
    "drift_triggered": (
        {"h": 8, "threshold": 1.0, "max_period": 64, "column": "loss"},
        {"threshold": POSITIVE, "column": TEXTS},
    ),
    "evenly_spaced": ({"h": 8, "n": 2}, {}),
    "every": ({"h": 4}, {}),
    "geometric": ({"h": 8, "rounds": 1, "factor": 2}, {}),
    "post_local": ({"switch": 4, "h": 4}, {}),
    "qsr": (
        {"lr_schedule": optax.constant_schedule(0.1), "alpha": 0.1, "h_base": 2},
        {"lr_schedule": FUNCTION, "alpha": POSITIVE},
    ),
    "with_lag": ({"schedule": lsgd.every(4), "tau": 2}, {}),
    "with_lead": ({"schedule": lsgd.every(4), "tau": 2}, {}),
    # Algorithms, placement and training.
    "local_sgd": (
        {"loss_fn": abs, "optimizer": OPTIMIZER, "rule": RULE, "has_aux": False},
        {"loss_fn": FUNCTION, "has_aux": TRUTHS, "rule": NONE},
    ),
    "from_train_step": (
        {"train_step": abs, "rule": RULE},
        {"train_step": FUNCTION, "rule": NONE},
    ),
    "simulate": (
        {"algorithm": ALGORITHM, "workers": 2, "axis": "worker", "worker_map": "vmap"},
        {"axis": NAME, "worker_map": NONE},
    ),
    "on_mesh": (ON_MESH, ON_MESH_ACCEPTS),
    "execution.on_processes": (ON_MESH, ON_MESH_ACCEPTS),
    "consensus": ({"state": state, "field": "params"}, {"field": (*NONE, *NAME)}),
    "local_workers": ({"cluster": cluster}, {}),
    "fused": ({"cluster": cluster}, {}),
    "gated": ({"cluster": cluster, "schedule": lsgd.every(2)}, {"schedule": FUNCTION}),
    "train": (TRAIN, TRAIN_ACCEPTS),
    "fault_tolerance.train": (FAULT_TRAIN, TRAIN_ACCEPTS | SECONDS),
    # Data.
    "shuffled_batches": (
        {
            **{"data": np.arange(6), "workers": 2, "batch": 1, "seed": 0},
            **{"examples_seen": 0, "local_workers": None},
        },
        {"data": ("array",), "local_workers": NONE},
    ),
    "partitioned_batches": (
        {
            "data": np.arange(6),
            "shards": [np.arange(3)],
            "batch": 1,
            "seed": 0,
            "examples_seen": 0,
            "local_workers": None,
        },
        {"data": ("array",), "local_workers": NONE},
    ),
    "dirichlet_partition": (
        {"labels": np.arange(8) % 2, "workers": 1, "alpha": 1.0, "seed": 0},
        {"alpha": POSITIVE, "labels": ("array", "array of text")},
    ),
    # Theory and cost model.
    "theory.bound": (
        {"constants": CONSTANTS, "run": RUN, "distance": 1.0, "a": 17},
        {"distance": POSITIVE, "a": ("large float", "huge int")},
    ),
    "theory.rate": ({"constants": CONSTANTS, "run": RUN}, {}),
    "theory.longest_period": (
        {"constants": CONSTANTS, "run": RUN, "a": 17},
        {"a": ("large float", "huge int")},
    ),
    "theory.drift": (
        {"learning_rate": 0.1, "second_moment": 1.0, "period": 4},
        {"learning_rate": POSITIVE, "second_moment": POSITIVE},
    ),
    "theory.mean_variance": (
        {"variance": 1.0, "workers": 2, "batch": 1},
        {"variance": POSITIVE},
    ),
    "theory.descent": (
        dict.fromkeys(("distance", "gap", "variance", "drift"), 1.0)
        | {"learning_rate": 0.1, "mu": 1.0, "smoothness": 1.0},
        dict.fromkeys(("distance", "gap", "variance", "drift"), POSITIVE)
        | {"mu": BELOW_ONE, "smoothness": ("large float", "huge int")},
    ),
    "theory.telescope": (
        {"first": 1.0, "noise": 1.0, "drift": 1.0, "mu": 1.0, "steps": 7, "a": 3},
        dict.fromkeys(("first", "noise", "drift", "mu"), POSITIVE)
        | {"a": ("large float", "huge int")},
    ),
    "theory.stepsize": (
        {"mu": 1.0, "a": 17},
        {"mu": POSITIVE, "a": ("large float", "huge int")},
    ),
    "theory.shift": (
        {"mu": 1.0, "smoothness": 1.0, "period": 4, "delay": 0},
        {"mu": BELOW_ONE, "smoothness": ("large float", "huge int")},
    ),
    "theory.weights": ({"a": 1.0, "power": 2}, {"a": POSITIVE, "power": POSITIVE}),
    "theory.weight_sum": (
        {"steps": 7, "a": 3},
        {"a": ("large float", "huge int")},
    ),
    "theory.running_average": ({"weight": theory.weights(3)}, {"weight": FUNCTION}),
    "theory.one_shot_bound": (
        {"constants": CONSTANTS, "run": RUN, "distance": 1.0, "a": 101},
        {"distance": POSITIVE, "a": ("large float", "huge int")},
    ),
    "theory.asynchronous_bound": (
        {
            "constants": CONSTANTS,
            "run": RUN,
            "distance": 1.0,
            "a": 17,
            "delay": 1,
            "coefficient": 768,
        },
        {
            "distance": POSITIVE,
            "a": ("large float", "huge int"),
            "coefficient": POSITIVE,
        },
    ),
    "theory.speedup": (
        {"workers": 2, "period": 2, "ratio": 1.0, "accuracy": 0.1},
        {"ratio": POSITIVE, "accuracy": POSITIVE},
    ),
    "theory.corrected_speedup": (
        {"workers": 2, "period": 2, "ratio": 1.0, "accuracy": 0.1},
        {"ratio": POSITIVE, "accuracy": POSITIVE},
    ),
    "theory.logistic_curvature": (
        {"features": np.ones((2, 1)), "penalty": 0.5},
        {"penalty": POSITIVE},
    ),
    "theory.quadratic_curvature": ({"hessian": np.eye(2)}, {}),
    "theory.curvature": (
        {"loss": abs, "examples": jnp.ones(2), "path": [], "iterations": 2},
        {"loss": FUNCTION, "examples": TREE, "path": ("list", "array", "dict")},
    ),
    "theory.estimate": (
        {"loss": abs, "examples": 1.0, "path": [], "mu": 1.0, "smoothness": 1.0},
        {
            "loss": FUNCTION,
            "examples": TREE,
            "path": ("list", "array", "dict"),
            "mu": BELOW_ONE,
            "smoothness": ("large float", "huge int"),
        },
    ),
    "planning.all_reduce_time": (
        {"link": LINK, "workers": 2, "size": 8},
        {"size": POSITIVE},
    ),
    "planning.exposed_communication_seconds": (
        {"workload": WORKLOAD, "link": LINK},
        {},
    ),
    "planning.exposed_communication_fraction": (
        {"workload": WORKLOAD, "link": LINK, "period": 2},
        {},
    ),
    "planning.round_time": ({"workload": WORKLOAD, "link": LINK, "period": 2}, {}),
    "planning.speedup": ({"workload": WORKLOAD, "link": LINK, "period": 2}, {}),
    "planning.period_for_communication_fraction": (
        {"workload": WORKLOAD, "link": LINK, "max_fraction": 0.1},
        {"max_fraction": BELOW_ONE},
    ),
    "planning.recommend_period": (
        {"workload": WORKLOAD, "link": LINK, "max_fraction": 0.1, "max_period": 8},
        {"max_fraction": BELOW_ONE, "max_period": NONE},
    ),
    "planning.fit_link": (
        {"workers": 2, "sizes": (1e3, 1e6), "seconds": (0.1, 0.2)},
        # Equal times are refused only if rounding does not make the slope positive.
        {"seconds": ("array",)},
    ),
    # Asynchronous local SGD.
    "asynchronous.constant_weighting": ({"value": 1.0}, {"value": POSITIVE}),
    "asynchronous.polynomial_weighting": ({"power": 0.5}, {"power": POSITIVE}),
    "asynchronous.server_optimizer": (
        {"optimizer": OPTIMIZER, "weighting": None},
        {"weighting": (*NONE, *FUNCTION)},
    ),
    "asynchronous.delayed_nesterov": (
        {
            "learning_rate": 0.7,
            "momentum": 0.9,
            "buffer": 2,
            "activation": 0.0,
            "weighting": None,
        },
        {
            "learning_rate": POSITIVE,
            "momentum": BELOW_ONE,
            "buffer": NONE,
            "activation": BELOW_ONE,
            "weighting": (*NONE, *FUNCTION),
        },
    ),
    "asynchronous.with_snapshots": (
        {"aggregation": None, "count": 2, "every": 1},
        {"aggregation": NONE},
    ),
    "asynchronous.random_speeds": (
        {"workers": 2, "steps": 2, "std": 0.5, "seed": 0, "speed": 1.0},
        {"std": POSITIVE, "speed": (*POSITIVE, "array")},
    ),
    "asynchronous.simulate_events": (
        {"workers": 2, "steps": 2, "schedule": 1, "speed": 1.0, "delay": 0.0},
        {
            "schedule": FUNCTION,
            "speed": (*POSITIVE, "array"),
            "delay": (*POSITIVE, "array"),
        },
    ),
    "asynchronous.max_staleness": ({"events": events}, {}),
    "asynchronous.throughput": (
        {"history": {"worker": [0], "steps": [1], "seconds": [1.0]}},
        {},
    ),
    "asynchronous.simulate": (
        {
            **{"algorithm": ALGORITHM, "events": events, "field": "params"},
            "aggregation": None,
        },
        {"field": TEXTS, "aggregation": NONE},
    ),
    "asynchronous.on_threads": (
        {
            **{"algorithm": ALGORITHM, "devices": None, "field": "params"},
            "aggregation": None,
        },
        {"field": TEXTS, "devices": NONE, "aggregation": NONE},
    ),
    # Analysis, checkpoints and processes.
    "analysis.filter_by_axis": (
        {"ops": OPS, "axis": "worker"},
        {"axis": (*NONE, *NAME)},
    ),
    "analysis.format_table": ({"ops": OPS}, {}),
    "analysis.total_bytes_sent": (
        {"ops": OPS, "axis": None, "network": None},
        {"axis": (*NONE, *NAME), "network": NONE},
    ),
    "analysis.parse_collective_ops": (
        {"text": "", "mesh": None},
        {"text": TEXTS, "mesh": (*NONE, "dict")},
    ),
    "checkpoint.RunCheckpointer": (
        {
            **{"directory": tempfile.gettempdir(), "cluster": cluster},
            **{"max_to_keep": 1, "seed": 0, "config": None},
            **{"process_local": False, "read_only": True},
        },
        {
            **{"directory": TEXTS, "config": (*NONE, "dict")},
            **{"process_local": TRUTHS, "read_only": TRUTHS},
        },
    ),
    # Reporting.
    **{
        f"reporting.{name}": ({"path": "unused"}, {"path": TEXTS})
        for name in ("to_csv", "to_jsonl")
    },
    "reporting.to_run_directory": (
        {"directory": tempfile.gettempdir(), "config": {}},
        {"directory": TEXTS, "config": ("dict",)},
    ),
    "reporting.to_clu": ({"writer": WRITER}, {}),
    "reporting.to_tensorboard": ({"writer": WRITER}, {}),
    "reporting.to_wandb": ({"run": WRITER}, {}),
    "reporting.columns_of": ({"rows": [{"step": 1}]}, {"rows": TEXTS[1:]}),
    "reporting.read_run": ({"path": "unused"}, {"path": TEXTS}),
    "reporting.write_report": (
        {"runs": [reporting.Run("a", {}, {"step": np.ones(1)})], "path": UNUSED},
        {"path": TEXTS},
    ),
    "checkpoint.export_params": (
        {"directory": "unused", "tree": 1.0},
        {"directory": TEXTS, "tree": TREE},
    ),
    "distributed.exit_process": ({"code": 1}, {"code": ()}),
    "worker_mesh": (
        {"workers": None, "devices": None, "inner_axes": None, "axis": "worker"},
        {"workers": NONE, "devices": NONE, "inner_axes": (*NONE, "dict"), "axis": NAME},
    ),
    "initialize": (
        {
            **{"timeout": 1.0, "heartbeat_timeout_seconds": 1, "recoverable": False},
            **{"coordinator_address": None, "num_processes": None, "process_id": None},
            **{"coordinator_bind_address": None, "config": None},
        },
        {
            **{"timeout": ("half",), "recoverable": TRUTHS},
            # Without the others, an address or a number raises.
            **{"coordinator_address": NONE, "num_processes": NONE, "process_id": NONE},
            **{"coordinator_bind_address": (*NONE, *TEXTS), "config": (*NONE, "dict")},
        },
    ),
} | adapter_functions.TABLE
# Functions whose arguments are arbitrary, and those that other tests call.
EXEMPT = {
    "reporting.to_all": "any number of writers; tests/reporting/test_loggers.py",
    "assert_no_collectives": "arguments of the step; tests/analysis",
    "collective_ops": "arguments of the program; tests/analysis",
    "analysis.jaxpr_bytes_sent": "arguments of the function; tests/analysis",
    "chain": "any number of rules; tests/rules",
    "identity": "no argument",
    "median": "no argument",
    "never": "no argument",
    "reset_to_init": "no argument",
    "asynchronous.mean_update": "no argument",
    "recompute_batch_stats": "arguments of the model; tests/rules",
    "from_arguments": "any number of values; tests/core",
    "parallelize": "any number of values; tests/training",
    "execution.merge_late_sync": "jitted; trees of arrays",
    "decoupled.full_precision": "no argument",
}
# Classes of results, and tuples that are checked where they are used.
MADE_BY_CALLS = "made by calls of the library"
EXEMPT_CLASSES = {
    **dict.fromkeys(("AdaptiveSchedule", "Schedule"), "made by schedules"),
    **dict.fromkeys(("Algorithm", "Cluster"), "checked by the calls that take them"),
    **dict.fromkeys(("CorrectedWorkerState", "WorkerState"), "train states"),
    **dict.fromkeys(("RuleState", "State", "SyncContext"), MADE_BY_CALLS),
    "reporting.Run": MADE_BY_CALLS,
    "SyncRule": "checked by the calls that take rules; tests/core/test_algorithm.py",
    **{
        f"analysis.{name}": MADE_BY_CALLS
        for name in ("Branch", "CollectiveOp", "Frame", "Loop")
    },
    **{
        f"asynchronous.{name}": MADE_BY_CALLS
        for name in (
            *("AsyncCluster", "AsyncState", "DelayedNesterov", "EventKind"),
            *("SnapshotState", "UpdateContext"),
        )
    },
    "asynchronous.Aggregation": "checked by simulate and on_threads",
    "asynchronous.EventTrace": "checked by simulate",
    **{
        f"decoupled.{name}": MADE_BY_CALLS
        for name in (
            *("Contribution", "Counts", "Join", "Leave", "Output", "Recomputed"),
            *("Reply", "Request", "Syncer", "SyncerState", "Tick"),
        )
    },
    "decoupled.Clock": "checked by simulate",
    "decoupled.Failure": "checked by simulate",
    "decoupled.MergePolicy": "checked by Job",
    "execution.ProcessCluster": MADE_BY_CALLS,
    "flax.NnxMetrics": MADE_BY_CALLS,
    "flax.NnxTrainState": MADE_BY_CALLS,
    "theory.AverageState": MADE_BY_CALLS,
    "theory.BoundTerms": MADE_BY_CALLS,
    "theory.RunningAverage": MADE_BY_CALLS,
    "theory.Constants": "checked by the functions that take them",
    "theory.RunParameters": "checked by the functions that take them",
}


def find(name):
    """Returns a function by the name of its row."""
    if name in adapter_functions.WRAPPERS:
        return adapter_functions.WRAPPERS[name]
    module, _, function = name.rpartition(".")
    if module == "planning":
        return getattr(cost_model, function, None) or getattr(measurement, function)
    return getattr(MODULES[module or "localsgd_jax"], function)


def arguments(good):
    """Returns valid arguments with the results of functions of these modules."""
    makers = (cluster, state, mesh, process_cluster, events, *_lambdas())
    makers = (*makers, *adapter_functions.MADE)
    return {k: v() if any(v is m for m in makers) else v for k, v in good.items()}


def _lambdas():
    """Returns the functions in the rows that make arguments."""
    return (TRAIN["batches"], FAULT_TRAIN["state"])
