"""Description of a decoupled job."""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator

import jax
import optax

from localsgd_jax.asynchronous.state import get_shared_field
from localsgd_jax.core.train_state import field_names
from localsgd_jax.core.types import Algorithm, Cluster, PyTree
from localsgd_jax.core.validation import (
    check,
    check_array_leaves,
    check_int,
    check_optimizer,
    check_type,
    describe,
)
from localsgd_jax.decoupled.fragments import num_fragments
from localsgd_jax.decoupled.merging import MergePolicy
from localsgd_jax.decoupled.payload import full_precision
from localsgd_jax.distributed.arrays import describe_leaves
from localsgd_jax.rules.codecs import Codec


@dataclasses.dataclass(frozen=True)
class Job:
    """Work of learners that exchange updates through a syncer.

    Each learner k repeats, without communicating with other learners:

        xₖ ← step(xₖ, ξ), H times
        send pₖ = xₖ − rₖ;   receive the model z;   xₖ ← z,  rₖ ← z

    A round of H = `every` batches is computed by one learner at a time. The syncer
    gives out the rounds in order, and those of a learner that was lost again.

    Attributes:
      algorithm: per-worker algorithm. Its rule synchronises the workers of a learner
        if `cluster` has several; between learners the merge policy takes its place.
      params: parameters, or the train state of one worker, that learners start from.
      batches: `batches(learner, start)` returns an iterator over the batches from index
        `start` of the job on, without end, with leaves `(K, B, ...)` for the K workers
        of a learner; called in the process of the learner. With `shuffled_batches`,
        `examples_seen` is `start` times K B.
      every: H, local steps of a learner from one contribution to the next.
      steps: local steps of all learners together.
      merge: `immediate()` or `quorum(q, grace)`.
      outer: optimizer of the model; its gradient is the negative mean update. None
        adds the mean update.
      field: field of the train state that is sent.
      fragments: number of parts F of the model with their own syncers. A learner sends
        one of them every H/F steps.
      compress: codec of the updates, such as `integers(4)`, with error feedback.
      overlap: τ, local steps that a learner takes while it waits for the model, at most
        H/F.
      exchanges: fragments that a learner with τ > 0 may have in flight, at most F. With
        2, one is sent while another is received.
      tokens: `tokens(batch)`, tokens in the batch of one step; None counts examples.
      cluster: `cluster(algorithm)` places the workers of a learner on its devices, such
        as `lambda algorithm: on_mesh(algorithm, mesh)`; None for one worker on one
        device.
    """

    algorithm: Algorithm
    params: PyTree
    batches: Callable[[int, int], Iterator[PyTree]]
    every: int
    steps: int
    merge: MergePolicy
    outer: optax.GradientTransformation | None = None
    field: str = "params"
    fragments: int = 1
    compress: Codec = dataclasses.field(default_factory=full_precision)
    overlap: int = 0
    exchanges: int = 1
    tokens: Callable[[PyTree], int] | None = None
    cluster: Callable[[Algorithm], Cluster] | None = None

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_types(self)
        for name, minimum in (("every", 1), ("steps", 1), ("fragments", 1)):
            check_int(f"Job({name})", "it", getattr(self, name), minimum)
        check_int("Job(overlap)", "it", self.overlap, 0)
        check_array_leaves("Job(params)", "params", self.params)
        names = field_names(self.algorithm.init(self.params)[0])
        text = f"it must be one of {', '.join(names)}"
        check(self.field in names, "Job(field)", text, describe(self.field))
        divides = self.every % self.fragments == 0
        text = f"it must divide every = {self.every}"
        check(divides, "Job(fragments)", text, self.fragments)
        text = f"it must be at most every / fragments = {steps_per_contribution(self)}"
        in_range = self.overlap <= steps_per_contribution(self)
        check(in_range, "Job(overlap)", text, self.overlap)
        check_int("Job(exchanges)", "it", self.exchanges, 1)
        limit = self.fragments if self.overlap else 1
        text = f"it must be at most the number of fragments, 1 without overlap: {limit}"
        check(self.exchanges <= limit, "Job(exchanges)", text, self.exchanges)
        self.merge.aggregation(self.outer)
        num_fragments("Job(fragments)", shared_params(self), self.fragments)


def check_job(call: str, job: object) -> None:
    """Raises a TypeError unless the argument is a `Job`."""
    check_type(f"{call}(job)", "job", job, Job)


def steps_per_contribution(job: Job) -> int:
    """Returns the local steps from one contribution of a learner to the next, H/F."""
    return job.every // job.fragments


def shared_params(job: Job) -> PyTree:
    """Returns the part of the train state that learners send.

    Args:
      job: a job.

    Raises:
      ValueError: if the train state has no such field.
    """
    return get_shared_field(job.algorithm.init(job.params)[0], job.field)


def fingerprint(job: Job) -> dict:
    """Returns the values that a learner and a syncer must have in common.

    Args:
      job: a job.

    Returns:
      JSON-compatible values by name.
    """
    packages = ("jax", "jaxlib", "localsgd-jax", "numpy", "optax")
    versions = {name: _version(name) for name in packages}
    return {
        "versions": versions,
        "params": describe_leaves(shared_params(job)),
        "every": job.every,
        "fragments": job.fragments,
        "overlap": job.overlap,
        "exchanges": job.exchanges,
        "merge": job.merge.name,
    }


def _version(package: str) -> str:
    """Returns the version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check_types(job: Job) -> None:
    """Raises a TypeError if an argument has the wrong type."""
    expected = {
        "algorithm": (Algorithm,),
        "merge": (MergePolicy,),
        "compress": (Codec,),
        "batches": (Callable,),
        "tokens": (Callable, type(None)),
        "cluster": (Callable, type(None)),
        "field": (str,),
    }
    for name, types in expected.items():
        check_type(f"Job({name})", name, getattr(job, name), *types)
    if job.outer is not None:
        check_optimizer("Job(outer)", job.outer)
    if not jax.tree.leaves(job.params):
        raise ValueError("Job(params): at least one leaf is needed, got none")
