"""The scripts that make the performance page and README's figure, and README's numbers."""

import importlib
import itertools
import json
import re
import statistics

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
    """Top-1 of the seeds after the last epoch, and their median minutes of training."""
    row = r"\[([\d., ]+) %\]\(docs/results/(recipe_\w+)\.md\) \| (\d+) min"
    rows = re.findall(row, (tiny.PROJECT / "README.md").read_text())
    assert len(rows) == 5
    for top1, name, minutes in rows:
        runs = json.loads((tiny.PROJECT / f"docs/results/{name}.json").read_text())["runs"]
        assert [float(value) for value in top1.split(", ")] == [
            round(run["top1"], 1) for run in runs
        ]
        median = statistics.median(run["seconds"] for run in runs)
        assert int(minutes) == round(median / 60), name


def test_readme_says_the_ranges_of_the_performance_page(made):
    def ends(values, digits=2):
        return f"{min(values):.{digits}f} to {max(values):.{digits}f}"

    readme = " ".join((tiny.PROJECT / "README.md").read_text().split())
    performance, zeros = made("performance"), made("zeros")
    page, record = performance.PAGE, json.loads(performance.RECORD.read_text())
    timed = r" \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| [\d.]*"  # seconds: ReLU's, tetdist's; ratios
    networks = re.findall(rf"\n\| [\w, ]+ \| \d+ \| \d+{timed}{timed} \|(?=\n)", page.read_text())
    assert len(networks) == len(performance.RESNETS)
    step = [float(one) for row in networks for one in row]
    assert f"ResNets on CPUs takes {ends(step)} times as long" in readme
    times, memories = [], []
    for name, precision in itertools.product(
        (performance.STEP, *performance.RESNETS), performance.PRECISIONS
    ):
        rows = performance.rows_of(record, f"{name}-{precision}")
        if "tetdist, blocks" in rows:
            blocks, none = (rows[f"tetdist, {mode}"] for mode in ("blocks", "none"))
            times.append(100 * (blocks["ratio"] / none["ratio"] - 1))
            memories.append(none["kept_mib"] / blocks["kept_mib"])
    assert len(times) == 6
    said = f"divides activation memory by {ends(memories, 0)} for {ends(times, 0)} % more time"
    assert said in readme
    rows = json.loads(zeros.RECORD.read_text())["rows"]
    trained = [row for row in rows if row["data"] == "sparsity_cifar10" and row["threads"] == 1]
    rows = [row for row in trained if (row["timesteps"], row["batch"]) == (4, 8)]
    assert len(rows) == 3
    shares = ends([100 * zeros.density(row) for row in rows], 0)

    def ratios(key, other):
        return ends([row["seconds"][key] / row["seconds"][other] for row in rows])

    said = (
        f"(spiking, MS and SEW, {shares} % spikes) a step takes {ratios('step', 'step dense')} of"
    )
    said += f" the dense one's time, and evaluation {ratios('eval', 'eval dense')}"
    assert said in readme


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
    page = performance.PAGE.read_text()
    named = r"\| \*\*spiking_resnet18\*\*, CIFAR-10 \| 64 \| 4 \| 8 \| (\d+) \(.*?\) \|(.*)"
    row = re.search(named, page)
    peer, relu, _, own, once, dense, skips, *_ = (float(ms) for ms in row[2].split("|")[:8])
    memory = dict(re.findall(r"\| bf16 \| (.*?) (?:\| [\d.]+ ){4}\| ([\d.]+) \|", page))
    expected = [peer / relu, 1, own / relu, 1, once / dense, skips / dense]
    expected += [float(memory[name.replace("relu", "ReLU")]) for name in figure.NAMES]
    assert [bar.get_width() for bar in costs.patches] == pytest.approx(expected, abs=0.011)
    step, evaluation, kept = (costs.patches[i].get_width() for i in (2, 5, 8))
    assert f"With {row[1]} % spikes a training step takes {step:.2f} times the time" in text
    assert f"evaluation {evaluation:.2f} of its time without skipping zeros" in text
    assert f"takes {kept:.2f} of the ReLU network's memory" in text
