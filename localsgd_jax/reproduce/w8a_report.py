"""What the table of the w8a experiment says: speedups, a figure, a comparison."""

from collections.abc import Sequence
from pathlib import Path

from localsgd_jax.reproduce import output, w8a_figure
from localsgd_jax.reproduce.output import Verdict

TOLERANCE = 0.15
# Iterations to ε = 0.005 by (b, K, H), from an independent program in C: 3 seeds, the
# step sizes c = 2⁻⁸ … 2¹, the target tested about every 4 %.
INDEPENDENT = {
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
    """Writes the speedups, the figure and the verdict.

    Args:
      directory: where.
      rows: of the table.
      rhos: prices of communication ρ.
      seeds: of which the rows are means.

    Returns:
      The verdict.
    """
    speeds = speedups(rows, (0.0, *rhos))
    if speeds:
        output.write_rows(directory / "w8a_speedup.csv", speeds)
        w8a_figure.draw(directory, speeds)
    verdicts = [*_compare(rows, seeds), *_summarise(speeds, rhos), *_missing(rows)]
    return output.write_verdicts(directory, "w8a", verdicts)


def speedups(rows: Sequence[dict], rhos: Sequence[float]) -> list[dict]:
    """Charges communication to the iterations, for all that reached ε.

        S(K) = T(1, 1) / (T(K, H) (1 + 2ρ(K − 1)/H))

    Args:
      rows: of the table.
      rhos: prices ρ: time to exchange a vector over time of a gradient.

    Returns:
      A row for each cell and price.

    Example:
      >>> cell = dict(epsilon=0.1, batch=4, workers=1, period=1, iterations=80.0)
      >>> two = cell | dict(workers=2, period=4, iterations=40.0)
      >>> [row["speedup"] for row in speedups([cell, two], [0.0, 2.0])]
      [1.0, 2.0, 1.0, 1.0]
    """
    alone = {
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
        if row["iterations"] and (base := alone.get((row["epsilon"], row["batch"])))
    ]


def _speedup(row: dict, base: float, rho: float) -> float:
    """Returns S(K), to four digits."""
    price = 1 + 2 * rho * (row["workers"] - 1) / row["period"]
    return float(f"{base / row['iterations'] / price:.4g}")


def _compare(rows: Sequence[dict], seeds: int) -> list[Verdict]:
    """Holds the iterations against the independent ones."""
    apart, doubt = {}, {}
    for row in rows:
        key = (row["batch"], row["workers"], row["period"])
        if row["epsilon"] == 0.005 and key in INDEPENDENT and row["first_grid"]:
            apart[key] = row["first_grid"] / INDEPENDENT[key] - 1
            doubt[key] = _standard_error(row, seeds)
    if not apart:
        return []
    far = {key: gap for key, gap in apart.items() if abs(gap) > TOLERANCE}
    worst = max(apart, key=lambda key: abs(apart[key]))
    shown = ", ".join(
        f"{gap:+.1%}{doubt[b, k, h]} at b = {b}, K = {k}, H = {h}"
        for (b, k, h), gap in ({worst: apart[worst]} | far).items()
    )
    return [
        Verdict(
            f"iterations to 0.005 within {TOLERANCE:.0%} of an independent program's, "
            f"means of 3 seeds, in each of {len(apart)} cells",
            f"in {len(apart) - len(far)} of {len(apart)}; largest difference {shown}",
        )
    ]


def _standard_error(row: dict, seeds: int) -> str:
    """Says how far apart a mean of 3 seeds and one of ours lie by chance."""
    if row["deviation"] is None:
        return ""
    spread = row["deviation"] / row["iterations"]
    error = spread * (1 / 3 + 1 / seeds) ** 0.5
    return f" (standard error {error:.1%})"


def _summarise(speeds: Sequence[dict], rhos: Sequence[float]) -> list[Verdict]:
    """Names the largest speedups."""
    verdicts = []
    for rho in (0.0, *rhos):
        seen = [
            f"{best['speedup']:.3g} (ε = {epsilon:g}, b = {batch}, "
            f"K = {best['workers']}, H = {best['period']})"
            for epsilon, batch, best in _largest(speeds, rho)
        ]
        price = f"communication at ρ = {rho:g}" if rho else "free communication"
        promise = (
            "at ε = 0.005 the model with all constants 1 has S < 1 for all K ≥ 2"
            if rho == 25
            else "more workers, fewer iterations; smaller H is better"
            if not rho
            else "between free communication and none"
        )
        verdicts.append(
            Verdict(f"{price}: {promise}", f"largest speedup {', '.join(seen)}")
        )
    return verdicts


def _largest(speeds: Sequence[dict], rho: float) -> list[tuple[float, int, dict]]:
    """Returns the cell of the largest speedup with K ≥ 2 for each ε and b."""
    groups = {}
    for row in speeds:
        if row["rho"] == rho and row["workers"] > 1:
            groups.setdefault((row["epsilon"], row["batch"]), []).append(row)
    return [
        (epsilon, batch, max(rows, key=lambda row: row["speedup"]))
        for (epsilon, batch), rows in groups.items()
    ]


def _missing(rows: Sequence[dict]) -> list[Verdict]:
    """Names the cells without a result."""
    return [
        Verdict(
            f"ε = {row['epsilon']:g} is reached with b = {row['batch']}, "
            f"K = {row['workers']}, H = {row['period']}",
            "not reached"
            if row["status"] == "not reached"
            else "every step size of the grid diverged",
        )
        for row in rows
        if row["status"] != "reached"
    ]
