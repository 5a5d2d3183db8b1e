"""Memory and traffic of each rule where a worker spans many devices.

Command: python -m benchmarks sharded_rules (10 minutes; needs the compiler for TPUs)
Expected: arguments are the least possible, and nothing but scalars is sent inside a
worker. Temporary memory is at most four pieces.

The synchronisation of each rule is compiled ahead of time, in a process of its own with
limits of time and memory, for meshes of TPU slices or GPU hosts. The compiled program
is read, not run. A piece is the part of the parameters that one device holds.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pods import compilation, results, topology, traffic
from benchmarks.pods.rule_programs import MESHES, RULES

KEYS = ("mesh", "rule", "size", "weighted")
COLUMNS = ("argument_bytes", "temp_bytes", "inner_bytes", "dcn_bytes", "compile_cpu_s")


def compile_rule(
    mesh: str,
    rule: str,
    size: str,
    weighted: bool,
    limits: compilation.Limits,
    package: Path,
) -> dict:
    """Compiles the synchronisation of a rule in another process; returns its row."""
    case = {"mesh": mesh, "rule": rule, "size": size, "weighted": weighted}
    compiled = compilation.compile_in_process(
        "benchmarks.pods.rule_programs:lower_sync", case, limits, package
    )
    return case | read_row(compiled, MESHES[mesh])


def read_row(
    compiled: compilation.Compilation, described: topology.Topology
) -> dict[str, Any]:
    """Returns sizes, traffic and times of a compiled synchronisation."""
    sent = dict.fromkeys(traffic.Traffic._fields)
    if compiled.text:
        sent = traffic.read(compiled.text, described)._asdict()
    return compiled.measured | sent | {"failure": compiled.failure}


def rules_of(mesh: str) -> list[str]:
    """Returns the rules for a mesh; rules with levels need two worker axes."""
    levels = len(MESHES[mesh].worker_axes) > 1
    return [rule for rule in RULES if rule.startswith("levels") == levels]


def comparison_table(before: Sequence[dict], after: Sequence[dict]) -> str:
    """Returns the table of one mesh, with the values before and after a change."""
    earlier = {row["rule"]: row for row in before}
    head = ["rule", "least", "arguments", "temporary", "inside a worker"]
    lines = [[*head, "across slices", "compile time"]]
    for row in after:
        old = earlier.get(row["rule"])
        values = [_column(row, name) for name in COLUMNS]
        if old:
            old_values = [_column(old, name) for name in COLUMNS]
            values = _join_changes(old_values, values)
        least = results.format_bytes(row.get("least_bytes"))
        lines.append([f"`{row['rule']}`", least, *values])
    return results.markdown_table(lines)


def _column(row: dict, name: str) -> str:
    if row["failure"]:
        return row["failure"] if name == COLUMNS[0] else ""
    if name == "compile_cpu_s":
        return f"{row[name]:.1f} s"
    return results.format_bytes(row[name])


def _join_changes(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Returns "old → new" where they differ; times always."""
    return [
        b if a == b else f"{a or '–'} → {b or '–'}"
        for a, b in zip(old, new, strict=True)
    ]


def meshes_table(rows: Sequence[dict]) -> str:
    """Returns arguments, temporary memory and traffic of all rules on other meshes."""
    if not rows:
        return "Not measured yet."
    names = [name for name in MESHES if any(row["mesh"] == name for row in rows)]
    rules = [rule for rule in RULES if any(row["rule"] == rule for row in rows)]
    found = {(row["mesh"], row["rule"]): row for row in rows}
    lines = [["rule", *names]]
    for rule in rules:
        cells = (_summary(found.get((name, rule))) for name in names)
        lines.append([f"`{rule}`", *cells])
    return results.markdown_table(lines)


def _summary(row: dict | None) -> str:
    """Returns memory and traffic of one row in one cell."""
    if row is None:
        return ""
    if row["failure"]:
        return row["failure"]
    size = results.format_bytes
    return (
        f"{size(row['argument_bytes'])} + {size(row['temp_bytes'])}; "
        f"{size(row['inner_bytes'])}; {size(row['worker_bytes'])}"
    )


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks sharded_rules", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--mesh", nargs="+", choices=list(MESHES), default=["2-slices"])
    parser.add_argument("--rules", nargs="+", choices=list(RULES), metavar="RULE")
    parser.add_argument(
        "--small", dest="size", action="store_const", const="small", default="large"
    )
    parser.add_argument(
        "--tiny", dest="size", action="store_const", const="tiny", help="for a test"
    )
    parser.add_argument("--weighted", action="store_true", help="workers with weights")
    parser.add_argument("--seconds", type=float, default=300, help="limit of a rule")
    parser.add_argument("--gigabytes", type=float, default=8, help="limit of a rule")
    parser.add_argument(
        "--package",
        type=Path,
        default=compilation.ROOT,
        help="directory with the localsgd_jax to compile with",
    )
    parser.add_argument("--resume", action="store_true", help="only missing rows")
    parser.add_argument("--name", default="sharded_rules", help="of the result files")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument(
        "--page", type=Path, help="writes the results into a page and measures nothing"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_arguments(arguments)
    if options.page:
        write_page(options.out, options.page)
        return
    families = {MESHES[mesh].target.partition(":")[0] for mesh in options.mesh}
    for family in sorted(families):
        if reason := topology.missing_compiler(family):
            raise SystemExit(f"sharded_rules: {reason}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name}.json"
    command = shlex.join(["python", "-m", "benchmarks", "sharded_rules", *arguments])
    limits = compilation.Limits(options.seconds, options.gigabytes)
    done = results.keys_of(path, KEYS) if options.resume else set()
    for mesh in options.mesh:
        for rule in options.rules or rules_of(mesh):
            if (mesh, rule, options.size, options.weighted) in done:
                continue
            row = compile_rule(
                mesh, rule, options.size, options.weighted, limits, options.package
            )
            results.update(path, row, KEYS, command)
            print(_progress(row), flush=True)


def _progress(row: dict) -> str:
    """Returns a row as a line of text, sizes in GiB."""
    columns = "  ".join(f"{_column(row, name):>9}" for name in COLUMNS)
    return f"{row['mesh']:<12} {row['rule']:<38} {columns}".rstrip()


def write_page(folder: Path, page: Path) -> None:
    """Writes the tables of `sharded_rules*.json` into a page."""
    path = folder / "sharded_rules.json"
    rows = results.read(path)["rows"]
    after = _large(rows)
    before = _large(results.read(folder / "sharded_rules_before.json")["rows"])
    main_mesh = next(iter(MESHES))
    weighted = _large(rows, weighted=True)
    results.fill_page(
        page,
        {
            "two slices": comparison_table(
                [row for row in before if row["mesh"] == main_mesh],
                [row for row in after if row["mesh"] == main_mesh],
            ),
            "weighted": comparison_table([], weighted)
            if weighted
            else "Not measured yet.",
            "versions": results.versions(path),
            "other meshes": meshes_table(
                [row for row in after if row["mesh"] != main_mesh]
            ),
        },
    )


def _large(rows: Sequence[dict], weighted: bool = False) -> list[dict]:
    return [
        row for row in rows if row["size"] == "large" and row["weighted"] == weighted
    ]
