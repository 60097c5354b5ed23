"""The scripts that make the performance page and README's figure, and README's numbers."""

import importlib
import json
import re

import pytest
import tiny

from tetdist.apps.reports import style


@pytest.fixture
def made(monkeypatch):
    """Imports a script of docs/make."""
    monkeypatch.syspath_prepend(tiny.PROJECT / "docs/make")
    return importlib.import_module


def test_the_page_is_that_of_the_record(made):
    performance = made("performance")
    record = json.loads(performance.RECORD.read_text())
    assert performance.page(record) == performance.PAGE.read_text()


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_contestants_and_the_memory_that_the_documentation_promises(precision, made, monkeypatch):
    performance = made("performance")
    monkeypatch.setattr(performance, "FIXED", {"size": 64, "device": "cpu"})
    modes = ("none", "blocks", "timesteps")
    entry = performance.Entry("sew_resnet34", 4, 2, modes, repeats=1, has_peer=True)
    found = {row["name"]: row for row in performance.measured(entry, precision)["rows"]}
    assert list(found) == ["relu", *(f"tetdist, {mode}" for mode in modes), performance.PEER]
    assert all(row["waiting"] in performance.WAITING for row in found.values())
    kept = {name: row["kept_mib"] for name, row in found.items()}
    # The convolutions' outputs, and spikes in bytes; ReLU keeps its own output as well.
    assert kept["tetdist, none"] < 0.65 * kept["relu"]
    assert kept["tetdist, blocks"] < 0.25 * kept["tetdist, none"]


def test_readmes_table_has_the_numbers_of_its_pages():
    """Top-1 of the seeds after the last epoch, and their minutes of training."""
    row = r"\[([\d., ]+) %\]\(docs/results/(recipe_\w+)\.md\) \| ([\dto ]+) min"
    rows = re.findall(row, (tiny.PROJECT / "README.md").read_text())
    assert len(rows) == 5
    for top1, name, minutes in rows:
        runs = json.loads((tiny.PROJECT / f"docs/results/{name}.json").read_text())["runs"]
        assert [float(value) for value in top1.split(", ")] == [
            round(run["top1"], 1) for run in runs
        ]
        durations = [round(run["seconds"] / 60) for run in runs]
        ends = sorted({min(durations), max(durations)})
        assert minutes == " to ".join(map(str, ends)), name


def test_readme_says_the_ranges_of_the_performance_page(made):
    def ends(values, digits=2):
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    readme = " ".join((tiny.PROJECT / "README.md").read_text().split())
    page = made("performance").PAGE
    timed = r" \| [\d.]+ \| [\d.]+ \| ([\d.]+)"  # ReLU's seconds, tetdist's, their ratio
    networks = re.findall(rf"\n\| \w+ \| \d+ \| \d+{timed}{timed} \|(?=\n)", page.read_text())
    ratios = [float(ratio) for pair in networks for ratio in pair]
    assert f"ResNets on CPUs takes {ends(ratios)} times as long" in readme
    rows = json.loads((page.parent / "performance/zeros.json").read_text())["rows"]
    sparse = [row for row in rows if row["network"] == "spiking_resnet34" and row["density"] < 0.25]
    spikes = ends([100 * row["density"] for row in sparse], 0)
    steps = ends([row["step"] / row["step relu"] for row in sparse])
    evaluations = ends([row["eval"] / row["eval dense"] for row in sparse])
    said = f"a step of Spiking-ResNet34 takes {steps} of that time, and evaluation {evaluations} of"
    assert f"at {spikes} % spikes {said}" in readme


def test_readmes_figure_shows_the_numbers_of_the_text_and_of_the_page(made, monkeypatch):
    drawn = []
    monkeypatch.setattr("sys.argv", ["readme_figure.py"])
    monkeypatch.setattr(style, "save", lambda figure, _: drawn.append(figure))
    figure, performance = made("readme_figure"), made("performance")
    assert figure.main() == 0
    exits, costs = drawn[0].axes
    (text,) = re.findall(r"\[!\[(Mean timesteps .*)\]\(", (tiny.PROJECT / "README.md").read_text())
    rows = re.findall(r"([\d.]+) and ([\d.]+) of (\d+)", text)
    page = json.loads((tiny.PROJECT / "docs/results/losses.json").read_text())
    holm = {
        row["data"]: row["holm"]["exit"]
        for row in page["differences"]
        if (row["entry"], row["control"]) == ("tet", "sdt")
    }
    assert len(rows) == len(exits.get_yticklabels()) == len(holm)
    for place, (row, label) in enumerate(zip(rows, exits.get_yticklabels(), strict=True)):
        texts = [text for text in exits.texts if text.xy[1] == place]
        assert [text.get_text() for text in texts] == [*row[:2], f"of {row[2]}"]
        bold = holm[label.get_text()] < 0.05
        assert {text.get_fontweight() == "bold" for text in texts} == {bold}
        tet, sdt, most = map(float, row)
        ends = [100 * tet / most, 100 * sdt / most]
        assert list(exits.lines[3 * place].get_xdata()) == pytest.approx(ends, abs=6 / most)
    table = r"\| bf16 \| (.*?) \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|"
    costs_of = {name: each for name, *each in re.findall(table, performance.PAGE.read_text())}
    names = [name.replace("relu", "ReLU") for name in figure.NAMES]
    expected = [float(costs_of[name][column]) for column in (0, 1) for name in names]
    assert [bar.get_width() for bar in costs.patches] == pytest.approx(expected, abs=0.0051)
    assert f"takes {expected[2]:.2f} times the time" in text
    assert f"and {expected[6]:.2f} of its memory" in text
