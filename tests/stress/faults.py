"""Jobs with faults until there are enough of them, with a file of their records."""

import argparse
import json
import pathlib
import time


def parse_options(results):
    """Parses the options of a soak test; `results` is the default of `--out`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=pathlib.Path, default=results)
    return parser.parse_args()


def num_faults(records):
    return sum(len(record["faults"]) for record in records)


def run_jobs(options, about, run_job):
    """Runs jobs until there are enough faults or the time is over.

    Args:
      options: from `parse_options`. The records in `out` are continued.
      about: further entries of the file.
      run_job: returns the record of the job with a seed.

    Returns:
      The records of all jobs.
    """
    records = []
    if options.out.exists():
        records = json.loads(options.out.read_text())["jobs"]
    deadline = time.monotonic() + 60 * options.minutes
    while num_faults(records) < options.faults and time.monotonic() < deadline:
        record = run_job(options.seed + len(records))
        records.append(record)
        options.out.write_text(json.dumps(about | {"jobs": records}, indent=1) + "\n")
        print(num_faults(records), json.dumps(record), flush=True)
    return records


def markdown_table(rows):
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows)
