"""Descriptions of mismatches, and fingerprints of configurations."""

import json

from localsgd_jax.distributed import mismatches


def test_mismatches_are_nested_and_limited():
    many = {i: {"at": {f"leaf{j}": i for j in range(9)}} for i in range(2)}
    found = mismatches.describe_mismatches(many)
    assert found[0] == "at.leaf0: 0 in process 0, 1 in process 1"
    assert len(found) == 6 and found[-1] == "and 4 more"
    equal = {0: {"x": [1]}, 1: json.loads('{"x": [1]}')}
    assert mismatches.describe_mismatches(equal) == []


def test_configs_are_compared_after_a_json_round_trip():
    given, converted = {"H": (4, 8), 1: {2: 3}}, {"1": {"2": 3}, "H": [4, 8]}
    for config in (given, converted):
        assert mismatches.to_json("initialize(config)", config) == converted


def test_processes_are_listed_up_to_a_limit():
    assert mismatches.format_processes([2]) == "process 2"
    assert mismatches.format_processes(range(3, 13)).endswith("11, 12")
    assert mismatches.format_processes(range(3, 14)).endswith("11, 12, …")
