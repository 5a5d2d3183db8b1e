"""Arguments of `initialize`, and calls without other processes."""

import jax
import numpy as np
import pytest
from harness.selection import in_full, keep

import localsgd_jax as lsgd

PROCESSES = [(), ("localhost:1", 1, 0), ("localhost:1", 2, 0)]


def test_single_process_is_a_no_op():
    assert lsgd.initialize() == 1
    assert lsgd.initialize("localhost:1234", 1, 0) == 1
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("process", keep(PROCESSES, [()]))
@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"heartbeat_timeout_seconds": 0},
            "heartbeat_timeout_seconds must be at least 1, got 0",
        ),
        in_full(
            {"heartbeat_timeout_seconds": 1.5},
            "heartbeat_timeout_seconds must be an int, got 1.5",
        ),
        ({"timeout": 0}, r"timeout must be in \(0, 1000000.0\], got 0"),
        ({"timeout": float("nan")}, r"timeout must be in \(0, 1000000.0\]"),
        in_full({"timeout": float("inf")}, "timeout must be finite"),
        in_full({"timeout": "9"}, "must be a real number, got '9'"),
        ({"config": [("H", 4)]}, r"must be a mapping, got \[\('H', 4\)\]"),
        ({"config": {"H": np.ones((9, 9))}}, r"got array\(.*\) for 'H'"),
        in_full({"config": {"a": {"b": {1}}}}, r"got \{'b': \{1\}\} for 'a'"),
        ({"config": {(1, 2): 1}}, r"got 1 for \(1, 2\)"),
    ],
)
def test_invalid_arguments_raise_also_without_peers(process, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        lsgd.initialize(*process, **arguments)
    (name,) = arguments
    assert str(caught.value).startswith(f"initialize({name}): ")
    assert "\n" not in str(caught.value)


def test_initialize_after_backend_raises():
    jax.devices()
    message = "must be called before any JAX device is used"
    with pytest.raises(RuntimeError, match=message):
        lsgd.initialize("localhost:1234", 2, 1)
