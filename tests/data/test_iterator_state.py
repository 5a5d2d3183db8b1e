"""States of iterators: round trip through JSON, and methods that are recognised."""

import json

import numpy as np
import pytest

from localsgd_jax.data.iterator_state import (
    check_checkpointable,
    from_json,
    set_iterator_state,
    state_reader,
    to_json,
)


class Grains:
    """Iterator with `get_state` that returns the object that it changes."""

    def __init__(self):
        self.state = {"next": [0]}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


class Stateful:
    """Loader with `state_dict`."""

    def state_dict(self):
        return {"position": 1}

    def load_state_dict(self, state):
        self.loaded = state


def test_states_survive_json():
    state = {
        "bytes": b"\x00\xff",
        "tuple": (1, "a", None, [True, 2.5]),
        "keys": {0: 1, (1, 2): "x"},
        "tag": {"__type__": "bytes"},
        "array": np.arange(6, dtype=np.uint32).reshape(2, 3).T,
        "scalar": np.float32(0.1),
        "large": np.random.default_rng(0).bit_generator.state,
        "empty": {},
    }
    restored = from_json(json.loads(json.dumps(to_json("call", state))))
    assert repr(restored) == repr(state)
    assert restored["array"].dtype == np.uint32
    assert restored["array"].flags.writeable


def test_a_value_without_a_form_in_json_is_named():
    with pytest.raises(TypeError, match=r"got .*object.* at \['a'\]\[1\]"):
        to_json("save(data_state)", {"a": [0, object()]})


def test_both_pairs_of_methods_are_used():
    grains, stateful = Grains(), Stateful()
    for iterator, state in ((grains, {"next": [7]}), (stateful, {"position": 7})):
        check_checkpointable("restore(batches)", iterator)
        set_iterator_state(iterator, state)
    assert grains.state == {"next": [7]} and stateful.loaded == {"position": 7}


def test_states_are_copies():
    grains = Grains()
    read = state_reader(iter([]), grains)
    first = read()
    grains.state["next"][0] = 5
    assert first == {"next": [0]}


def test_other_iterators_have_no_state():
    assert state_reader([], iter([])) is None
    with pytest.raises(TypeError, match="batches must have get_state and set_state or"):
        check_checkpointable("restore(batches)", iter([]))
