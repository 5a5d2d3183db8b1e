"""Round numbers with a static position in the cycle of a rule.

Rules choose fragments, neighbours and snapshots by the round number. A traced number
leaves the choice to a conditional of the program, and compilers overlap nothing with a
collective inside a conditional. A `CyclicRound` makes the choice while the rule is
traced, and one program serves all rounds of a residue class.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

_MAX_PERIOD = 64
Result = TypeVar("Result")


class RoundClass(NamedTuple):
    """Round numbers r with r ≡ residue modulo period.

    Attributes:
      period: length of the cycle, in rounds.
      residue: from 0 to period − 1.
    """

    period: int
    residue: int

    def number(self, value: jax.Array) -> "CyclicRound":
        """Returns a number of this class.

        Args:
          value: int32 scalar ≥ 1.

        Returns:
          The number.
        """
        return CyclicRound(value, self.period, self.residue, minimum=1)


class PeriodTooShort(Exception):
    """A choice depends on more than the residue of the round number.

    Attributes:
      factor: smallest number by which the period must be multiplied.
    """

    def __init__(self, factor: int) -> None:
        """Initialises the error."""
        super().__init__(f"the period must be {factor} times as long")
        self.factor = factor


@jax.tree_util.register_pytree_node_class
class CyclicRound:
    """A traced round number with a static residue.

        value = period · q + residue,   value ≥ minimum,   q traced

    Sums, products and quotients with Python ints keep a residue, and remainders are
    Python ints. Comparisons are Python bools where residue or minimum decide them.
    With other operands, and as an argument of JAX, the number is its value.

    Attributes:
      value: int32 scalar, traced.
      period: static.
      residue: static, from 0 to period − 1.
      minimum: static lower bound of the value.
    """

    def __init__(self, value: Any, period: int, residue: int, minimum: int) -> None:
        """Initialises the number; the residue is reduced modulo the period."""
        self.value, self.period, self.minimum = value, period, minimum
        self.residue = residue % period

    def tree_flatten(self) -> tuple[tuple, tuple]:
        """Returns the value as leaf, and the static attributes."""
        return (self.value,), (self.period, self.residue, self.minimum)

    @classmethod
    def tree_unflatten(cls, static: tuple, leaves: tuple) -> "CyclicRound":
        """Inverts `tree_flatten`."""
        return cls(*leaves, *static)

    def __jax_array__(self) -> jax.Array:
        """Returns the value."""
        return jnp.asarray(self.value)

    def __repr__(self) -> str:
        """Returns the residue class."""
        return f"{self.residue} modulo {self.period}"

    def __add__(self, other: Any) -> Any:
        """Adds a number."""
        if not isinstance(other, int):
            return self.value + other
        return CyclicRound(
            self.value + other,
            self.period,
            self.residue + other,
            self.minimum + other,
        )

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """Subtracts a number."""
        return self + -other

    def __rsub__(self, other: Any) -> Any:
        """Subtracts from a number."""
        return other - self.value

    def __mul__(self, other: Any) -> Any:
        """Multiplies by a number."""
        if not isinstance(other, int) or other < 1:
            return self.value * other
        return CyclicRound(
            self.value * other,
            self.period * other,
            self.residue * other,
            self.minimum * other,
        )

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        """Divides by a number and rounds down."""
        if not isinstance(other, int) or other < 1:
            return self.value // other
        self._require_multiple_of(other)
        return CyclicRound(
            self.value // other,
            self.period // other,
            self.residue // other,
            self.minimum // other,
        )

    def __mod__(self, other: Any) -> Any:
        """Returns the remainder."""
        if not isinstance(other, int) or other < 1:
            return self.value % other
        self._require_multiple_of(other)
        return self.residue % other

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        """Returns quotient and remainder."""
        return self // other, self % other

    def __eq__(self, other: Any) -> Any:
        """Compares with a number."""
        if isinstance(other, int):
            has_residue = (other - self.residue) % self.period == 0
            if other < self.minimum or not has_residue:
                return False
        return self.value == other

    def __ne__(self, other: Any) -> Any:
        """Compares with a number."""
        is_equal = self == other
        return not is_equal if isinstance(is_equal, bool) else ~is_equal

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __gt__(self, other: Any) -> Any:
        """Compares with a number."""
        return self._is_at_least(other, 1) or self.value > other

    def __ge__(self, other: Any) -> Any:
        """Compares with a number."""
        return self._is_at_least(other, 0) or self.value >= other

    def __lt__(self, other: Any) -> Any:
        """Compares with a number."""
        return not self._is_at_least(other, 0) and self.value < other

    def __le__(self, other: Any) -> Any:
        """Compares with a number."""
        return not self._is_at_least(other, 1) and self.value <= other

    def _is_at_least(self, other: Any, margin: int) -> bool:
        """Returns whether the minimum exceeds a Python int by a margin."""
        return isinstance(other, int) and self.minimum >= other + margin

    def _require_multiple_of(self, divisor: int) -> None:
        """Raises unless a divisor divides the period."""
        if self.period % divisor:
            raise PeriodTooShort(divisor // math.gcd(divisor, self.period))


class Cycle(Generic[Result]):
    """Function of the class of a round, with the period that its rules need.

    The period grows when a trace needs a longer one. A result for a shorter period
    stays valid, since it holds for all rounds of its class.

    Attributes:
      period: common period of the rounds seen so far; None if there is none up to 64.
    """

    def __init__(self, function: Callable[[RoundClass], Result]) -> None:
        """Starts with period 1.

        Args:
          function: traces a rule with `sync` or with `RoundClass.number`.
        """
        self._function = function
        self._results: dict[RoundClass, Result] = {}
        self.period: int | None = 1

    def __call__(self, round_number: int) -> Result | None:
        """Returns the result for the class of a round, computed once for each class.

        Args:
          round_number: 1 for the first round.

        Returns:
          The result; None if the rule cannot be traced for a class of rounds.
        """
        while self.period:
            round_class = RoundClass(self.period, round_number % self.period)
            if round_class in self._results:
                return self._results[round_class]
            try:
                self._results[round_class] = self._function(round_class)
            except PeriodTooShort as error:
                period = self.period * error.factor
                self.period = period if period <= _MAX_PERIOD else None
            except Exception:
                # A rule may do with a round number what only integers can do.
                self.period = None
        return None
