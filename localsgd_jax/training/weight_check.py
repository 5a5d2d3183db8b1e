"""Check on the host of the weights that a metric gives the workers."""

import numpy as np

from localsgd_jax.core.validation import check_weights
from localsgd_jax.training.dispatch import DispatchResult
from localsgd_jax.training.round_weights import MetricWeights, RoundWeights


class WeightCheck:
    """Check of the weights of each round, from the metrics of its local steps."""

    def __init__(self, weights: RoundWeights, round_number: int) -> None:
        """Starts a round.

        Args:
          weights: weights of the rounds.
          round_number: number of the next round, 1 for the first.
        """
        self._weights, self._round = weights, round_number
        self._steps: list[np.ndarray] = []
        self._by_metric: MetricWeights | None = None

    def append_steps(self, result: DispatchResult) -> None:
        """Adds the local steps of a dispatch, and checks the rounds that it ends.

        Args:
          result: metrics on the host.

        Raises:
          ValueError: if a weight is not 0 and not in the range of weights.
        """
        weights = self._weights.by_metric(result.metrics)
        if weights is None or weights.metric not in result.metrics:
            return
        self._by_metric, values = weights, result.metrics[weights.metric]
        for row, ends_round in zip(values, result.due, strict=True):
            self._steps.append(row)
            if ends_round:
                self.close_round()

    def close_round(self) -> None:
        """Checks the weights of the round that the appended steps make."""
        steps, self._steps = self._steps, []
        number, self._round = self._round, self._round + 1
        if self._by_metric is None:
            return
        total = np.stack(steps).sum(0, dtype=np.float32)
        weights = self._by_metric(total, np.float32(len(steps)))
        call = f"train(weights): {self._by_metric} in round {number}"
        check_weights(weights, len(total), call)
