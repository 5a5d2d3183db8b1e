"""The page of `localsgd report`: contents, and behaviour in a browser."""

import json
import re

import numpy as np
import pytest
from harness.browser import CHROMIUM, load
from harness.command_line import error_of, invoke

from localsgd_jax.reporting import Run, read_run, to_run_directory, write_report


def make_run(name, period, rounds=40, **columns):
    round_number = np.arange(1, rounds + 1.0)
    common = {
        "step": round_number * period,
        "round": round_number,
        "bytes": round_number * 448,
        "seconds": 0.5 + round_number * 0.01,
        "loss": np.exp(-round_number * period / 50),
    }
    config = {"period": period, "optimizer": {"name": "adam", "rate": 0.1}}
    return Run(name, config, common | columns)


@pytest.fixture
def page(tmp_path):
    """Page of two runs, of which one has evaluations, drift and waiting."""
    rounds = np.arange(40.0)
    more = {
        "accuracy": np.where(rounds % 5 == 4, 0.9, np.nan),
        "consensus_distance": rounds,
        "wait_seconds.0": rounds * 0,
        "wait_seconds.1": np.where(rounds < 20, 0.2, np.nan),
    }
    path = tmp_path / "report.html"
    write_report([make_run("a<b", 4), make_run("second", 16, **more)], path)
    return path


def figure_of(page):
    """Returns traces and layout of the figure of a page."""
    text = page.read_text().rpartition("Plotly.newPlot(")[2]
    decoder, found = json.JSONDecoder(), []
    for _ in range(2):
        start = min(i for i in map(text.find, "[{") if i >= 0)
        value, length = decoder.raw_decode(text[start:])
        found.append(value)
        text = text[start + length :]
    return found


def test_page_has_tables_curves_and_menus(page):
    text = page.read_text()
    assert "<th>a&lt;b</th>" in text
    assert '<tr class="differs"><th>period</th><td>4</td><td>16</td></tr>' in text
    assert "<tr><th>optimizer.name</th><td>adam</td><td>adam</td></tr>" in text
    assert "<tr><th>accuracy</th><td>–</td><td>0.9</td></tr>" in text
    assert "<tr><th>sum of wait_seconds</th><td>–</td><td>2</td></tr>" in text
    traces, layout = figure_of(page)
    panels = [x["text"] for x in layout["annotations"]]
    assert panels == [
        *("loss", "accuracy", "bytes sent by each worker"),
        *("drift: consensus_distance", "wait_seconds, mean over processes"),
        "seconds per round",
    ]
    assert [x["name"] for x in traces] == [
        *("a<b", "second", "second", "a<b", "second"),
        *("second", "second", "a<b", "second"),
    ]
    assert [x["showlegend"] for x in traces] == [True, True, *[False] * 7]
    assert traces[2]["x"] == [80, 160, 240, 320, 400, 480, 560, 640]
    assert traces[6]["y"] == [0.1] * 20 + [0.0] * 20
    labels = [button["label"] for button in layout["updatemenus"][0]["buttons"]]
    assert labels == ["local steps", "rounds", "bytes sent by each worker", "seconds"]


def test_page_needs_no_network(page):
    """Plotly's code is inside, and no element loads anything."""
    text = page.read_text()
    assert len(text) > 1e6
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(src|href)=[\"'](?!data:)", outside)
    assert not re.search(r"<script[^>]+src=", text)


# Chooses the third column in the menu, then a click on the first run of the legend.
CLICKS = """
const wait = ms => new Promise(done => setTimeout(done, ms));
const figure = document.getElementById('figure');
const press = (element) => {
  for (const kind of ['mousedown', 'mouseup', 'click'])
    element.dispatchEvent(new MouseEvent(kind, {bubbles: true, view: window}));
};
const before = figure.data[0].x[0];
press(figure.querySelectorAll('.updatemenu-header')[0]);
await wait(1000);
press(figure.querySelectorAll('.updatemenu-dropdown-button')[2]);
await wait(1000);
press(figure.querySelector('.legendtoggle'));
await wait(1500);
return JSON.stringify({
  before, after: figure.data[0].x[0], title: figure.layout.xaxis3.title.text,
  shown: figure.data.map(trace => trace.visible ?? true),
  drawn: figure.querySelectorAll('.scatterlayer .trace').length,
  legend: figure.querySelector('.legend').getBoundingClientRect().top > 0,
});
"""


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_menu_and_legend_work_in_a_browser(page):
    title, console = load(page, CLICKS)
    assert console == []
    found = json.loads(title)
    is_first = [x["name"] == "a<b" for x in figure_of(page)[0]]
    assert found == {
        "before": 4,
        "after": 448,
        "title": "bytes sent by each worker",
        "shown": ["legendonly" if first else True for first in is_first],
        "drawn": 6,
        "legend": True,
    }


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_browser_reports_errors_of_a_page(tmp_path):
    path = tmp_path / "broken.html"
    path.write_text("<html><body><script>throw Error('broken')</script></body></html>")
    title, console = load(path, "return 'loaded'")
    assert title == "loaded" and "broken" in console[0]


def test_command_reads_directories_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write = to_run_directory("run", {"period": 4})
    write({"step": 4, "round": 1, "loss": 0.5})
    (tmp_path / "other.csv").write_text("step,loss\n4,0.25\n")
    done = invoke("report run other.csv --out page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout == "written: page.html\n"
    assert (
        "<tr><th>loss</th><td>0.5</td><td>0.25</td></tr>"
        in (tmp_path / "page.html").read_text()
    )


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\n[2]\n')
    (tmp_path / "other.csv").write_text("time\n4\n")
    (tmp_path / "words.csv").write_text("step\nfour\n")
    assert error_of("report missing") == "missing: No such file or directory"
    assert "empty/history.jsonl: no such file" in error_of("report empty")
    assert "got '[2]' in line 2" in error_of("report bad.jsonl")
    assert "each field must be a number, got line 2" in error_of("report words.csv")
    assert "must have a column \"step\", got 'other.csv'" in error_of(
        "report other.csv"
    )


def test_names_that_occur_twice_are_numbered(tmp_path):
    path = tmp_path / "report.html"
    write_report([make_run("run", 4), make_run("run", 8)], path)
    assert [x["name"] for x in figure_of(path)[0][:2]] == ["run (1)", "run (2)"]


def test_several_calls_of_train_become_one_run(tmp_path):
    rows = [
        *[{"step": 4 * i, "seconds": i, "bytes": 10 * i, "loss": i} for i in (1, 2)],
        # A further call of `train`, interrupted and resumed from step 12.
        *[{"step": 8 + 4 * i, "seconds": i / 2, "bytes": 10 * i} for i in (1, 2, 3)],
        *[{"step": 12 + 4 * i, "seconds": i / 4, "bytes": 10 * i} for i in (1, 2)],
    ]
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2')
    columns = read_run(path).columns
    assert columns["step"].tolist() == [4, 8, 12, 16, 20]
    assert columns["seconds"].tolist() == [1, 2, 2.5, 2.75, 3]
    assert columns["bytes"].tolist() == [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"step,step\n1,2\n", "must have a name of its own"),
        ("a.csv", b"\xff\xfe", "must be text in UTF-8"),
        ("a.jsonl", b'{"step": 1' + b"0" * 400 + b"}\n", "'step' must be a real"),
    ],
)
def test_files_without_rows_of_a_history_raise(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_run(path)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"step": np.ones(2)}, "must have numbers besides its steps"),
        ({"step": np.ones(2), "loss": np.ones(3)}, "'loss' of 'a' must have a real"),
        ({"step": np.ones(2), "loss": np.ones(2) * 1j}, "real number per row"),
    ],
)
def test_runs_without_curves_raise(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report([Run("a", {}, columns)], tmp_path / "page.html")
