"""Faults planted in `localsgd_jax/schedules/`."""

from mutation.mutant import Mutant

MUTANTS = {
    "synchronises at 1, 1 + h, …": Mutant(
        "schedules/periodic.py",
        "(t % h == 0)",
        "(t % h == 1)",
        "schedules/test_schedules.py",
    ),
    "fixes the length of a QSR round at a later step": Mutant(
        "schedules/growing.py",
        "ends.append(ends[-1] + int(period(ends[-1])))",
        "ends.append(ends[-1] + int(period(ends[-1] + 5)))",
        "schedules/test_schedules.py -k qsr",
    ),
    "rounds the spacing of fragments": Mutant(
        "schedules/streaming.py",
        "((t * n + n - 1) // h > (t * n - 1) // h)",
        "(t % (h // n) == 0)",
        "schedules/test_schedules.py -k evenly_spaced",
    ),
    "applies an update to dispatched steps": Mutant(
        "schedules/adaptive.py",
        "[end for end in self.round_ends if end <= step]",
        "[end for end in self.round_ends if end <= self.last_step]",
        "schedules/test_adaptive.py -k dispatched",
    ),
    "halves a period upwards": Mutant(
        "schedules/adaptive.py",
        "max(1, length // 2)",
        "max(1, (length + 1) // 2)",
        "schedules/test_adaptive.py -k halves_downwards",
    ),
    "accepts an offset equal to the spacing": Mutant(
        "schedules/streaming.py",
        "tau < spacing",
        "tau <= spacing",
        "schedules/test_streaming.py -k invalid",
    ),
    "rounds a QSR length down in float32": Mutant(
        "schedules/growing.py",
        "ratio**2 * (1 + 1e-6)",
        "ratio**2",
        "schedules/test_schedules.py -k tolerates",
    ),
}
