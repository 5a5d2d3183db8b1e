"""Instructions that may leave a device, and transfers between TPU slices."""

import ctypes
import json

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
from localsgd_jax.analysis import (
    compile_targets,
    parse_collective_ops,
    program_audit,
    total_bytes_sent,
)
from localsgd_jax.analysis.hlo.local_instructions import describe_unknown
from localsgd_jax.analysis.hlo.parser import Instruction

SLICES = "tpu:v5e:2x2:slices=2"
UNKNOWN = {
    "infeed": "%i = ((f32[8]{0}), token[]) infeed(%t)",
    "outfeed": "%o = token[] outfeed(%x, %t)",
    "send": "%s = (f32[8]{0}, u32[], token[]) send(%x, %t), channel_id=1",
    "recv": "%r = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=1",
    "custom call": '%c = f32[8]{0} custom-call(%x), custom_call_target="f"',
    "async start": "%a = f32[8]{0} mystery-start(%x)",
    "async custom call": '%c = f32[8]{0} custom-call-start(%x), custom_call_target="f"',
    "Pallas barrier": "%k = f32[8]{0} custom-call(%x), custom_call_target="
    '"tpu_custom_call", backend_config={"custom_call_config":{"collective_id":"3"}}',
    "unreadable Pallas kernel": "%k = f32[8]{0} custom-call(%x), "
    'custom_call_target="tpu_custom_call"',
    "Mosaic GPU kernel": "%k = f32[8]{0} custom-call(%x), "
    'custom_call_target="mosaic_gpu_v2"',
    "unknown computation": "%f = f32[8]{0} fusion(%x), kind=kLoop, calls=%elsewhere",
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


def test_instruction_on_several_lines():
    """The compilers print the metadata of some kernels with line breaks."""
    text = module_text("%x = f32[8]{0} parameter(0)").replace(
        "parameter(0)",
        "parameter(0)\n  %k = f32[8]{0} custom-call(%x), custom_call_target="
        '"tpu_custom_call", frontend_attributes={kernel_metadata={\n"axes":"[]"\n}}, '
        'backend_config={"custom_call_config":{"has_communication":true}}',
    )
    (op,) = parse_collective_ops(text)
    assert op.problem == "Pallas kernel that communicates"
    local = text.replace('"has_communication":true', '"body":"TUzv"')
    assert parse_collective_ops(local) == ()


def test_computation_without_a_caller_is_not_understood():
    text = module_text(
        "%x = f32[8]{0} parameter(0)",
        rest="""
        %orphan (p: f32[8]) -> f32[8] {
          %p = f32[8]{0} parameter(0)
          ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}
        }
        """,
    )
    (op,) = parse_collective_ops(text, {"worker": 8})
    assert op.problem == "all-reduce in a computation without a caller"


def test_called_computations_of_a_custom_call_are_read():
    text = module_text(
        """
        %x = f32[8]{0} parameter(0)
        %k = f32[8] custom-call(%x), custom_call_target="TopK", called_computations={%f}
        """,
        rest="""
        %f (p: f32[8]) -> f32[8] {
          %p = f32[8]{0} parameter(0)
          ROOT %r = f32[8]{0} all-reduce(%p), replica_groups={}
        }
        """,
    )
    (op,) = parse_collective_ops(text, {"worker": 8})
    assert (op.name, op.axes) == ("all-reduce", ("worker",))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text + "what is this?\n", "unreadable line .*what is this"),
        (lambda text: text + "\n" + text, "that of one module, got 2"),
        (lambda text: text[: text.rindex("}")], "ends in a computation"),
        (lambda text: text.replace("%x = ", "x "), "unreadable line .*x f32"),
    ],
)
def test_text_that_cannot_be_parsed_raises(change, message):
    text = module_text("%x = f32[8]{0} parameter(0)")
    assert parse_collective_ops(text) == ()
    with pytest.raises(ValueError, match=r"collective_ops\(program\): .*" + message):
        parse_collective_ops(change(text))


@pytest.mark.parametrize(
    "opcode",
    ["call-update", "infeed-start", "all-gather-of-the-future", "domain-start", "rng"],
)
def test_opcodes_in_no_list_are_not_understood(opcode):
    instruction = Instruction("i", "f32[]", opcode, (), "", "")
    is_local = opcode in ("call-update", "domain-start", "rng")
    assert describe_unknown(instruction) == (None if is_local else opcode)


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


def test_custom_call_of_a_user_raises():
    """Compiled with a target that is registered, but is in no list."""
    signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
    kernel = signature(lambda out, inputs: None)
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.restype = ctypes.py_object
    make_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    address = ctypes.cast(kernel, ctypes.c_void_p)
    capsule = make_capsule(address, b"xla._CUSTOM_CALL_TARGET", None)
    jax.ffi.register_ffi_target("user_kernel", capsule, "cpu", api_version=0)

    def step(x):
        result = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ffi.ffi_call("user_kernel", result, custom_call_api_version=2)(x)

    workers = mesh(worker=8)
    spec = jax.sharding.PartitionSpec("worker")
    sharded = jax.shard_map(
        step, mesh=workers, in_specs=spec, out_specs=spec, check_vma=False
    )
    sharding = jax.sharding.NamedSharding(workers, spec)
    argument = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    with pytest.raises(
        lsgd.UnexpectedCollectiveError, match='custom call "user_kernel"'
    ) as caught:
        lsgd.assert_no_collectives(sharded, argument)
    assert f"test_fails_closed.py:{step.__code__.co_firstlineno + 2}" in str(
        caught.value
    )


# The audit, and the columns of bytes.


def callback_program(devices, *, kind):
    """Returns a step with a callback, which is inside a conditional if it is gated."""
    spec = jax.sharding.PartitionSpec("worker")
    sharding = jax.sharding.NamedSharding(devices, spec)

    def step(x):
        def report(x):
            jax.debug.callback(lambda x: None, x)
            return x + 1

        if kind == "gated":
            return jax.lax.cond(x[0] > 0, report, lambda x: x, x)
        return report(x)

    sharded = jax.shard_map(
        step, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False
    )
    return sharded, jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)


@pytest.mark.parametrize("kind", ["step", "gated", "round"])
def test_audit_reports_instructions_not_understood(kind):
    report = program_audit.audit_program(
        lambda devices: callback_program(devices, kind=kind),
        *(mesh(worker=8), "worker", kind),
    )
    text = program_audit.format_report(report)
    assert len(report.violations) == 1
    assert "\nFAILED: 1 of 1 collectives along 'worker'" in text
    reason = r'  not understood: host callback "xla_'
    assert reason in text and "test_fails_closed.py:" in text.partition(reason)[2]
    assert "each device sends 0 to ? bytes" in text
    (op,) = json.loads(json.dumps(program_audit.report_to_dict(report)))["collectives"]
    assert op["violation"] and op["problem"].startswith("host callback")
    assert op["bytes_sent"] is op["ici_bytes_sent"] is op["dcn_bytes_sent"] is None


def test_program_on_no_mesh_raises():
    """Its arguments have no shardings, so that it runs on one device."""
    workers = mesh(worker=8)
    shape = jax.ShapeDtypeStruct((8,), jnp.float32)
    message = "must run on all 8 devices of the mesh, got 1; give its arguments"
    with pytest.raises(ValueError, match="audit: the program " + message):
        program_audit.audit_program(
            lambda devices: (jnp.mean, shape), workers, "worker", "step"
        )
    call = r"assert_no_collectives\(step\): the program "
    with pytest.raises(ValueError, match=call + message):
        lsgd.assert_no_collectives(jnp.mean, shape, mesh=workers)


def test_callbacks_do_not_end_the_columns_of_bytes():
    """The columns count the collectives and leave out the callback."""

    def loss_fn(w, batch):
        jax.debug.callback(lambda x: None, jax.lax.stop_gradient(w[0]))
        return jnp.sum((w - batch) ** 2)

    algorithm = lsgd.local_sgd(loss_fn, optax.sgd(0.1), rule=lsgd.average())
    cluster = lsgd.on_mesh(algorithm, mesh(worker=8))
    state, history = lsgd.train(
        cluster,
        cluster.init(jnp.zeros(16)),
        [np.ones((8, 16), np.float32)] * 4,
        schedule=2,
        progress=False,
    )
    ops = lsgd.collective_ops(cluster.sync, state)
    low, high = total_bytes_sent(ops, "worker")
    assert low == high
    assert np.diff(history["device_bytes"], prepend=0).tolist() == [high] * 2


# Several slices, with the TPU compiler.


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
