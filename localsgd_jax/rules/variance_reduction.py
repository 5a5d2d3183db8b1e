"""Control variates against the drift of workers with different data."""

import jax
import jax.numpy as jnp

from localsgd_jax.core import collectives
from localsgd_jax.core.averaging import average, check_inexact
from localsgd_jax.core.call_names import call_name
from localsgd_jax.core.pytrees import accumulation_dtype
from localsgd_jax.core.types import PyTree, RuleState, SyncContext, SyncRule
from localsgd_jax.core.validation import check, check_int, check_number, check_rule

FIELDS = ("params", "correction")


def control_variates(
    learning_rate: float, period: int, rule: SyncRule | None = None
) -> SyncRule:
    """Corrects local gradients by the drift of each worker.

    With the step size η of the local steps and the period H, a local step adds the
    correction mₖ, which starts at 0, and a synchronisation updates it:

        xₖ ← xₖ − η (∇f(xₖ; ξ) + mₖ)       local step
        mₖ ← mₖ + (xₖ − x̄) / (H η)         synchronisation, x̄ = mean of xₖ
        xₖ ← x̄

    mₖ approaches ∇f(x̄) − ∇fₖ(x̄), so each worker descends the mean loss although its
    data differ. With exact gradients and strong convexity the method converges linearly
    at any period, where local SGD stalls. The weighted sum of mₖ stays 0. A worker of
    weight 0 keeps its mₖ.

    The rule synchronises two fields of the train state together, "params" and
    "correction". `local_sgd` makes the second and adds it to gradients. For
    `from_train_step` the train state holds it, zeros in the structure of the parameters
    in float32 at least, and the step adds it.

    The equation assumes SGD with a constant step size. With small batches mₖ is mostly
    the gradient noise of the last round, and with momentum or Adam inside xₖ − x̄ is not
    H η times a gradient.

    Args:
      learning_rate: η of the local steps, positive.
      period: H, local steps between two synchronisations, as in the schedule.
      rule: a rule that is a mean; None for `average()`.

    Returns:
      A rule for `("params", "correction")`. It communicates like `rule`: the correction
      is not sent.

    Raises:
      TypeError: if the period is not an int or `rule` not a rule; at `init`, for a leaf
        that is not floating point or complex.
      ValueError: if a number is out of range or `rule` is not a mean; at `init`, if the
        tree does not consist of the two fields.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import localsgd_jax as lsgd
      >>> def loss(x, b):                        # f₁ = x²/2, f₂ = (x − 3)²
      ...     curvature, optimum = b
      ...     return curvature / 2 * (x - optimum) ** 2
      >>> rule = lsgd.control_variates(0.1, period=2)
      >>> algorithm = lsgd.local_sgd(loss, optax.sgd(0.1), rule)
      >>> cluster = lsgd.simulate(algorithm, workers=2)
      >>> state, batch = cluster.init(0.0), (jnp.array([1.0, 2]), jnp.array([0.0, 3]))
      >>> for _ in range(200):
      ...     for _ in range(2):
      ...         state, _ = cluster.step(state, batch)
      ...     state = cluster.sync(state)
      >>> round(float(lsgd.consensus(state)), 4)    # local SGD ends at 1.9636
      2.0

    References:
      Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated
      Learning, 2020, Algorithm 1, option II, with mₖ = c − cₖ. arXiv:1910.06378
      Mishchenko, Malinovsky, Stich, Richtárik, ProxSkip: Yes! Local Gradient Steps
      Provably Lead to Communication Acceleration! Finally!, 2022, Scaffnew with
      mₖ = −hₖ and the period 1/p fixed. arXiv:2202.09357
    """
    call = "control_variates"
    name = "learning_rate"
    learning_rate = check_number(f"{call}({name})", name, learning_rate, above=0)
    period = check_int(f"{call}(period)", "period", period, 1)
    mean_rule = average() if rule is None else rule
    check_rule(f"{call}(rule)", mean_rule)
    is_mean = mean_rule.mean_axes is not None
    check(is_mean, f"{call}(rule)", "it must be a mean, such as average()", mean_rule)

    def init(tree: PyTree, specs: PyTree | None = None) -> RuleState:
        _check_fields(tree)
        check_inexact(f"{call}()", tree)
        return mean_rule.init(tree["params"], specs and specs["params"])

    def apply(
        tree: PyTree, state: RuleState, context: SyncContext
    ) -> tuple[PyTree, RuleState]:
        params, correction = (tree[field] for field in FIELDS)
        specs = context.specs and context.specs["params"]
        mean, state = mean_rule.apply(params, state, context._replace(specs=specs))
        is_active = collectives.is_active(context)

        def update(m: jax.Array, x: jax.Array, x_mean: jax.Array) -> jax.Array:
            dtype = accumulation_dtype(x)
            drift = x.astype(dtype) - x_mean.astype(dtype)
            drift = jnp.where(is_active, drift, 0)
            return m + (drift / (period * learning_rate)).astype(m.dtype)

        correction = jax.tree.map(update, correction, params, mean)
        return {"params": mean, "correction": correction}, state

    name = call_name(call, rule, learning_rate=learning_rate, period=period)
    return SyncRule(init, apply, name=name, fields=FIELDS)


def _check_fields(tree: PyTree) -> None:
    """Raises a ValueError unless the tree consists of the two fields."""
    fields = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
    check(
        fields == sorted(FIELDS),
        "control_variates()",
        f"it synchronises the fields {FIELDS} together; in a dict of rules "
        "{('params', 'correction'): control_variates(…)}",
        fields,
    )
