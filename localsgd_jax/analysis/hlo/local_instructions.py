"""Instructions that stay on their device."""

import re

from localsgd_jax.analysis.hlo.parser import Instruction
from localsgd_jax.analysis.ring_bytes import RING_BYTES_FACTOR

# Every other opcode may leave the device. The computations that `async`, `call`,
# `conditional`, `fusion`, `map`, `while` and others execute are read themselves.
_LOCAL_OPCODES = frozenset(
    """
    abs acos acosh add add-dependency after-all and asin asinh async atan2 atanh
    batch-norm-grad batch-norm-inference batch-norm-training bitcast bitcast-convert
    broadcast call cbrt ceil cholesky clamp compare complex concatenate conditional
    constant convert convolution copy cos cosh cosine count-leading-zeros divide domain
    dot dynamic-reshape dynamic-slice dynamic-update-slice erf exponential
    exponential-minus-one fft floor fusion gather get-dimension-size get-tuple-element
    imag iota is-finite log log-plus-one logistic map maximum minimum multiply negate
    not opt-barrier or pad parameter partition-id popcnt power ragged-dot real reduce
    reduce-precision reduce-window remainder replica-id reshape reverse rng
    rng-bit-generator rng-get-and-update-state round-nearest-afz round-nearest-even
    rsqrt scaled-dot scatter select select-and-scatter set-dimension-size shift-left
    shift-right-arithmetic shift-right-logical sign sin sine sinh slice sort sqrt
    stochastic-convert subtract tan tanh topk transpose triangular-solve tuple while xor
    """.split()
)

# Targets of custom calls that compute on, annotate or move data of one device. The
# AsyncCollective ones mark the ends of a collective that the TPU compiler splits over a
# loop; its pieces are collectives of their own, which are read.
_LOCAL_CUSTOM_CALLS = frozenset(
    """
    AllocateBuffer ApproxTopK AssumeGatherIndicesInBound AsyncCollectiveDone
    AsyncCollectiveStart Cholesky CompactWyHelper
    ConcatBitcast Eigh EighTpu GatherScatterIndicesBitpacked
    InvertDiagBlocksLowerTriangular InvertDiagBlocksUpperTriangular LayoutConstraint
    LuDecomposition LuDecompositionBlock LuRealDecompositionBlock MoveToDevice
    MoveToHost PartialReduce PinToDevice ProductOfElementaryHouseholderReflectors Qr
    QrDecompositionBlock ResizeBilinear ResizeBilinearGrad ResizeNearest
    ResizeNearestGrad SPMDFullToShardShape SPMDShardToFullShape Sharding SliceId TopK
    X64Combine X64SplitHigh X64SplitLow ZeroCrop __gpu$TopK __gpu$xla.gpu.triton
    annotate_device_placement cpu_csr_sparse_dense_ffi cu_cholesky_update_ffi
    cu_lu_pivots_to_permutation cu_threefry2x32_ffi triton_kernel_call
    """.split()
)
# Libraries for one device.
_LOCAL_LIBRARIES = (
    *("lapack_", "cublas_", "cusolver_", "cusparse_", "__onednn$"),
    *("__cublas$", "__cudnn$", "__cub$"),
)


def collective_opcode(instruction: Instruction) -> str | None:
    """Returns the collective that an instruction executes or starts, or None."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in RING_BYTES_FACTOR else None


def describe_unknown(instruction: Instruction) -> str | None:
    """Describes an instruction that may leave the device.

    Args:
      instruction: any instruction but a collective.

    Returns:
      The reason, such as `custom call "f"`; None if it stays on the device.
    """
    opcode = instruction.opcode
    if opcode.endswith(("-update", "-done")):
        return None  # Its start is read.
    if opcode in ("custom-call", "custom-call-start"):
        return _describe_custom_call(instruction)
    if opcode in ("send", "recv"):
        is_host = "is_host_transfer=true" in instruction.attributes
        direction = {"send": "to", "recv": "from"}[opcode]
        return f"{opcode} {direction} the host" if is_host else opcode
    if opcode.removesuffix("-start") in _LOCAL_OPCODES:
        return None
    return opcode


def _describe_custom_call(instruction: Instruction) -> str | None:
    """Describes a custom call; returns None if it stays on the device."""
    match = re.search(r'\bcustom_call_target="([^"]*)"', instruction.attributes)
    target = match[1] if match else ""
    if target in _LOCAL_CUSTOM_CALLS or target.startswith(_LOCAL_LIBRARIES):
        return None
    if target == "tpu_custom_call":
        return _describe_mosaic_kernel(instruction)
    if "callback" in target:
        return f'host callback "{target}"'
    return f'custom call "{target}"'


def _describe_mosaic_kernel(instruction: Instruction) -> str | None:
    """Describes a Pallas kernel for TPUs; returns None if it stays on the device.

    JAX writes `has_communication` for a kernel with copies or semaphores of other
    devices, and `collective_id` for one with a barrier.
    """
    configuration = re.search(
        r'"custom_call_config":\{.*', instruction.attributes, re.DOTALL
    )
    if configuration is None:
        return "Pallas kernel without configuration"
    communicates = re.search(
        r'"has_communication":\s*true|"collective_id":', configuration[0]
    )
    return "Pallas kernel that communicates" if communicates else None
