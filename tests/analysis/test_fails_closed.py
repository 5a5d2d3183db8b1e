"""Instructions that may leave a device, and transfers between TPU slices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from analysis.test_audit import audit_for_target
from analysis.test_collective_ops import module_text
from harness.cases import mesh
from harness.selection import in_full

import localsgd_jax as lsgd
from localsgd_jax.analysis import compile_targets, parse_collective_ops

SLICES = "tpu:v5e:2x2:slices=2"
UNKNOWN = {
    "infeed": "%i = ((f32[8]{0}), token[]) infeed(%t)",
    "outfeed": "%o = token[] outfeed(%x, %t)",
    "send": "%s = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1",
    "recv": "%r = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1",
    "custom call": '%c = f32[8]{0} custom-call(%x), custom_call_target="f"',
    "async start": "%a = f32[8]{0} mystery-start(%x)",
    "groups": "%g = f32[8]{0} all-reduce(%x), replica_groups=V9[1]",
    "Pallas kernel": "%k = f32[8]{0} custom-call(%x), custom_call_target="
    '"tpu_custom_call", backend_config={"custom_call_config":{"has_communication":'
    " true}}",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_instruction_counts_for_every_axis(kind):
    text = module_text(
        f"""
        %x = f32[8]{{0}} parameter(0)
        %t = token[] after-all()
        {UNKNOWN[kind]}
        ROOT %n = f32[8]{{0}} negate(%x)
        """
    )
    (op,) = parse_collective_ops(text, {"worker": 8})
    assert (op.name, op.axes) == ("not understood", None)
    assert op.problem and np.isinf(op.bytes_sent)


def test_local_instructions_are_no_ops():
    text = module_text(
        """
        %x = f32[8]{0} parameter(0)
        %c = f32[8]{0} custom-call(%x), custom_call_target="lapack_sgetrf_ffi"
        ROOT %n = f32[8]{0} negate(%c)
        """
    )
    assert parse_collective_ops(text, {"worker": 8}) == ()


@pytest.mark.parametrize(
    "callback",
    [
        lambda w: jax.debug.callback(lambda x: None, w),
        lambda w: jax.pure_callback(
            lambda x: x, jax.ShapeDtypeStruct(w.shape, w.dtype), w
        ),
        lambda w: jax.experimental.io_callback(
            lambda x: x, jax.ShapeDtypeStruct(w.shape, w.dtype), w
        ),
    ],
    ids=["debug", "pure", "io"],
)
def test_host_callback_in_a_step_raises(callback):
    def loss_fn(w, batch):
        result = callback(jax.lax.stop_gradient(w))
        return jnp.sum((w - batch) ** 2) + (0 if result is None else 0 * result.sum())

    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh(worker=8))
    state, batch = cluster.init(jnp.zeros(3)), jnp.zeros((8, 3))
    with pytest.raises(lsgd.UnexpectedCollectiveError, match="host callback"):
        lsgd.assert_no_collectives(cluster.step, state, batch)


@pytest.mark.parametrize("target", ["tpu:v5e:2x2x2", "tpu:v5e:2x2:2", "tpu:v5e:4x4*2"])
def test_other_notations_of_slices_raise(target):
    with pytest.raises(ValueError, match="slices="):
        compile_targets.target_mesh(target)


@pytest.mark.parametrize("family", [in_full("tpu")])
def test_transfers_between_slices_are_read(family):
    """The mean over eight workers on two slices: one part on ICI, one on DCN."""
    status, result = audit_for_target(family, "fused", "--kind", "round", *slices())
    assert (status, result["ok"]) == (0, True)
    parameters = 256 * 512 * 4
    assert {op["name"] for op in result["collectives"]} <= {
        *("all-reduce", "reduce-scatter", "all-gather")
    }
    low, high = result["dcn_bytes_sent"]
    # Two slices of four chips: each chip exchanges its quarter of the parameters.
    assert low == high == pytest.approx(2 * (1 / 2) * parameters / 4, rel=0.01)


@pytest.mark.parametrize("family", [in_full("tpu")])
def test_step_with_a_collective_between_slices_fails(family):
    status, result = audit_for_target(family, "step_with_collective", *slices())
    assert (status, result["ok"]) == (1, False)
    assert any(op["dcn_bytes_sent"] for op in result["collectives"])


def slices():
    """The arguments of the command line that follow the first target."""
    return "--target", SLICES
