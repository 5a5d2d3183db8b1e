"""Report of the w8a experiment: speedups, figure and comparison with references."""

from collections.abc import Sequence
from pathlib import Path

from localsgd_jax.experiments.paper import results, w8a_figure
from localsgd_jax.experiments.paper.results import Finding

TOLERANCE = 0.15
# Iterations to ε = 0.005 by (b, K, H), from an independent program in C: 3 seeds, the
# step sizes c = 2⁻⁸ … 2¹, the target tested about every 4 %.
REFERENCE_EPSILON, REFERENCE_SEEDS = 0.005, 3
REFERENCE_ITERATIONS = {
    (4, 1, 1): 18506,
    (4, 2, 1): 9259,
    (4, 2, 2): 9259,
    (4, 2, 4): 9143,
    (4, 2, 8): 9273,
    (4, 2, 16): 9388,
    (4, 2, 32): 9388,
    (4, 2, 64): 9753,
    (4, 4, 1): 4576,
    (4, 4, 2): 4635,
    (4, 4, 4): 4699,
    (4, 4, 8): 4825,
    (4, 4, 16): 5149,
    (4, 4, 32): 5421,
    (4, 8, 1): 1872,
    (4, 8, 16): 3391,
    (4, 8, 64): 4017,
    (4, 16, 1): 902,
    (4, 16, 16): 2488,
    (4, 16, 64): 2937,
    (4, 32, 1): 577,
    (4, 32, 16): 1885,
    (4, 32, 64): 2177,
    (16, 1, 1): 4576,
    (16, 4, 1): 902,
    (16, 4, 16): 1234,
    (16, 16, 1): 309,
    (16, 16, 16): 522,
    (16, 16, 64): 680,
    (16, 64, 1): 158,
    (16, 64, 16): 373,
}


def write(
    directory: Path, rows: Sequence[dict], rhos: Sequence[float], seeds: int
) -> str:
    """Writes the speedups and the figure and returns the findings as text.

    The rows of the table are means over `seeds` seeds.
    """
    table = speedups(rows, (0.0, *rhos))
    if table:
        results.write_rows(directory / "w8a_speedup.csv", table)
        w8a_figure.plot_speedups(directory, table)
    findings = [
        *_reference_findings(rows, seeds),
        *_speedup_findings(table, rhos),
        *_missing_cells(rows),
    ]
    return results.write_findings(directory, "w8a", findings)


def speedups(rows: Sequence[dict], rhos: Sequence[float]) -> list[dict]:
    """Returns the speedup with communication cost, for all cells that reached ε.

        S(K) = T(1, 1) / (T(K, H) (1 + 2ρ(K − 1)/H))

    Args:
      rows: rows of the table.
      rhos: all ρ: time to exchange a vector over time of a gradient.

    Returns:
      A row for each cell and ρ.

    Example:
      >>> cell = dict(epsilon=0.1, batch=4, workers=1, period=1, iterations=80.0)
      >>> two = cell | dict(workers=2, period=4, iterations=40.0)
      >>> [row["speedup"] for row in speedups([cell, two], [0.0, 2.0])]
      [1.0, 2.0, 1.0, 1.0]
    """
    sequential = {
        (row["epsilon"], row["batch"]): row["iterations"]
        for row in rows
        if row["workers"] == row["period"] == 1 and row["iterations"]
    }
    names = ("epsilon", "batch", "workers", "period")
    return [
        {name: row[name] for name in names}
        | {"rho": rho, "speedup": _speedup(row, base, rho)}
        for rho in rhos
        for row in rows
        if row["iterations"]
        and (base := sequential.get((row["epsilon"], row["batch"])))
    ]


def _speedup(row: dict, base: float, rho: float) -> float:
    """Returns S(K), rounded to four digits."""
    cost = 1 + 2 * rho * (row["workers"] - 1) / row["period"]
    return float(f"{base / row['iterations'] / cost:.4g}")


def _reference_findings(rows: Sequence[dict], seeds: int) -> list[Finding]:
    """Compares the iterations with the reference values."""
    deviations, errors = {}, {}
    for row in rows:
        key = (row["batch"], row["workers"], row["period"])
        if (
            row["epsilon"] == REFERENCE_EPSILON
            and key in REFERENCE_ITERATIONS
            and row["first_grid"]
        ):
            deviations[key] = row["first_grid"] / REFERENCE_ITERATIONS[key] - 1
            errors[key] = _standard_error(row, seeds)
    if not deviations:
        return []
    outside = {key: x for key, x in deviations.items() if abs(x) > TOLERANCE}
    largest = max(deviations, key=lambda key: abs(deviations[key]))
    listed = ", ".join(
        f"{deviation:+.1%}{errors[b, k, h]} at b = {b}, K = {k}, H = {h}"
        for (b, k, h), deviation in ({largest: deviations[largest]} | outside).items()
    )
    count = len(deviations)
    return [
        Finding(
            f"iterations to {REFERENCE_EPSILON:g} within {TOLERANCE:.0%} of an "
            f"independent program, means of {REFERENCE_SEEDS} seeds, in each of "
            f"{count} cells",
            f"in {count - len(outside)} of {count}; largest deviation {listed}",
        )
    ]


def _standard_error(row: dict, seeds: int) -> str:
    """Returns the standard error of the difference between the two means."""
    if row["std"] is None:
        return ""
    relative_std = row["std"] / row["iterations"]
    error = relative_std * (1 / REFERENCE_SEEDS + 1 / seeds) ** 0.5
    return f" (standard error {error:.1%})"


def _speedup_findings(table: Sequence[dict], rhos: Sequence[float]) -> list[Finding]:
    """Returns the largest speedups at each communication cost."""
    findings = []
    for rho in (0.0, *rhos):
        largest = [
            f"{best['speedup']:.3g} (ε = {epsilon:g}, b = {batch}, "
            f"K = {best['workers']}, H = {best['period']})"
            for epsilon, batch, best in _largest_speedups(table, rho)
        ]
        cost = f"communication at ρ = {rho:g}" if rho else "free communication"
        findings.append(
            Finding(
                f"{cost}: {_expected_speedup(rho)}",
                f"largest speedup {', '.join(largest)}",
            )
        )
    return findings


def _expected_speedup(rho: float) -> str:
    """Returns the expectation at a communication cost."""
    if rho == 25:
        return "at ε = 0.005 the model with all constants 1 has S < 1 for all K ≥ 2"
    if rho == 0:
        return "more workers need fewer iterations; smaller H is better"
    return "between free communication and no communication"


def _largest_speedups(
    table: Sequence[dict], rho: float
) -> list[tuple[float, int, dict]]:
    """Returns the cell of the largest speedup with K ≥ 2 for each ε and b."""
    groups = {}
    for row in table:
        if row["rho"] == rho and row["workers"] > 1:
            groups.setdefault((row["epsilon"], row["batch"]), []).append(row)
    return [
        (epsilon, batch, max(rows, key=lambda row: row["speedup"]))
        for (epsilon, batch), rows in groups.items()
    ]


def _missing_cells(rows: Sequence[dict]) -> list[Finding]:
    """Returns the cells that did not reach ε."""
    return [
        Finding(
            f"ε = {row['epsilon']:g} is reached with b = {row['batch']}, "
            f"K = {row['workers']}, H = {row['period']}",
            "not reached"
            if row["status"] == "not reached"
            else "every step size of the grid diverged",
        )
        for row in rows
        if row["status"] != "reached"
    ]
