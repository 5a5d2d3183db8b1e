"""Faults planted in `localsgd_jax/theory/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "omits the residual bound of unconverged Ritz values": Mutant(
        "theory/estimation.py",
        "float(values[0] - margin[0])",
        "float(values[0])",
        "theory/test_estimation.py -k conservative",
    ),
    "omits the previous Lanczos vector": Mutant(
        "theory/estimation.py",
        "product(current) - norm * previous",
        "product(current)",
        "theory/test_estimation.py -k curvature",
    ),
    "returns the curvature of the last point": Mutant(
        "theory/estimation.py",
        "return min(lower), max(upper)",
        "return lower[-1], upper[-1]",
        "theory/test_estimation.py -k curvature_of_logistic",
    ),
}
