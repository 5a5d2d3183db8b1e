"""Faults planted in `localsgd_jax/planning/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "predicts half of an all-reduce": Mutant(
        "planning/cost_model.py",
        "hops = 2 * (workers - 1)\n    return",
        "hops = workers - 1\n    return",
        "planning/test_cost_model.py",
    ),
    "overlaps a fragment with the steps of all fragments": Mutant(
        "planning/cost_model.py",
        "hidden = workload.overlap_steps * workload.step_seconds",
        "hidden = workload.fragments * workload.overlap_steps * workload.step_seconds",
        "planning/test_cost_model.py",
    ),
    "ignores the theoretical bound": Mutant(
        "planning/cost_model.py",
        "max_period is not None and max_period < period",
        "False",
        "planning/test_cost_model.py -k theory",
    ),
    "plans for float32 whatever --bits says": Mutant(
        "planning/settings.py",
        "settings.bits or 32,",
        "32,",
        "planning/test_planner.py -k fragments_and_overlap",
    ),
    "times an all-reduce of one number": Mutant(
        "planning/measurement.py",
        "max(1, size // 4)",
        "1",
        "planning/test_planner.py -k timed",
    ),
    "counts the dispatch as local steps": Mutant(
        "planning/measurement.py",
        "(seconds(high) - seconds(low)) / (high - low)",
        "seconds(high) / high",
        "planning/test_planner.py -k known_times",
    ),
    "ignores the overhead of a round": Mutant(
        "planning/measurement.py",
        "rest - exposed",
        "0 - exposed",
        "planning/test_planner.py -k overhead",
    ),
    "estimates constants at the initial parameters only": Mutant(
        "planning/period_bound.py",
        "state, _ = step(state, batch)",
        "step(state, batch)",
        "planning/test_planner.py -k trajectory",
    ),
    "bounds the period with too large a shift": Mutant(
        "planning/period_bound.py",
        "constants.smoothness, period)",
        "constants.smoothness, run.steps)",
        "planning/test_planner.py -k bound",
    ),
    "bounds the period with the devices instead of the workers": Mutant(
        "planning/settings.py",
        "workers = program.cluster.num_workers",
        "pass",
        "planning/test_planner.py -k measured_constants",
    ),
}
