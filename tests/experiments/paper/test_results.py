"""Resumable tables and findings."""

import pytest

from localsgd_jax.experiments.paper import results
from localsgd_jax.experiments.paper.results import Finding, ResumableTable

COLUMNS = ("name", "count", "fraction", "comment")


def test_table_round_trip(tmp_path):
    rows = [
        {"name": "a, b", "count": 3, "fraction": 0.1, "comment": None},
        {"name": "c", "count": -4, "fraction": 1e-300, "comment": "two\twords"},
    ]
    for row in rows:
        ResumableTable(tmp_path, "t", {"x": (1, 2)}, COLUMNS).append(row)
    assert ResumableTable(tmp_path, "t", {"x": [1, 2]}, COLUMNS).rows == rows


def test_incomplete_row_is_dropped(tmp_path):
    table = ResumableTable(tmp_path, "t", {}, COLUMNS)
    row = {"name": "a", "count": 1, "fraction": 0.5, "comment": "b"}
    table.append(row)
    complete = table.path.read_text()
    for missing in (1, 5):
        table.path.write_text(complete + complete.splitlines()[1][:-missing])
        assert ResumableTable(tmp_path, "t", {}, COLUMNS).rows == [row]
        assert table.path.read_text() == complete


def test_other_settings_raise(tmp_path):
    ResumableTable(tmp_path, "t", {"seeds": 3, "limit": 7}, COLUMNS)
    with pytest.raises(ValueError, match=r"other settings: seeds must be 3, got 4$"):
        ResumableTable(tmp_path, "t", {"seeds": 4, "limit": 7}, COLUMNS)
    with pytest.raises(ValueError, match="limit must be 7, got None"):
        ResumableTable(tmp_path, "t", {"seeds": 3}, COLUMNS)
    with pytest.raises(ValueError, match="columns"):
        ResumableTable(tmp_path, "t", {"seeds": 3, "limit": 7}, ("name",))
    (tmp_path / "t.json").unlink()
    with pytest.raises(ValueError, match=r"t\.csv exists without t\.json"):
        ResumableTable(tmp_path, "t", {"seeds": 3, "limit": 7}, COLUMNS)


def test_run_table_computes_only_missing_rows(tmp_path):
    computed, prepared = [], []

    def prepare():
        prepared.append(True)

        def make_row(key, rows):
            computed.append((key, len(rows)))
            return {"name": key}

        return make_row

    for keys in (["a", "b"], ["a", "b", "c"], ["a", "b", "c"]):
        table = ResumableTable(tmp_path, "t", {}, ["name"])
        rows = results.run_table(table, keys, prepare, work=len)
        assert rows == [{"name": key} for key in keys]
    assert computed == [("a", 0), ("b", 1), ("c", 2)] and len(prepared) == 2


def test_findings_are_written_line_by_line(tmp_path):
    text = results.write_findings(tmp_path, "n", [Finding("a", "b"), Finding("c", "d")])
    lines = ["n: expected: a", "n: observed: b", "n: expected: c", "n: observed: d"]
    assert text.splitlines() == lines
    assert (tmp_path / "n.txt").read_text(encoding="utf-8") == text
