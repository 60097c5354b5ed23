"""The scripts that make the performance page and README's figure."""

import importlib
import json

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


def test_readmes_figure_shows_the_numbers_that_are_in_the_project(made, monkeypatch):
    drawn = []
    monkeypatch.setattr("sys.argv", ["readme_figure.py"])
    monkeypatch.setattr(style, "save", lambda figure, _: drawn.append(figure))
    assert made("readme_figure").main() == 0
    page, performance = (
        json.loads((tiny.PROJECT / "docs" / file).read_text())
        for file in ("results/losses.json", "performance/results.json")
    )
    exits, costs = drawn[0].axes
    rows = [one for one in page["differences"] if (one["entry"], one["control"]) == ("tet", "sdt")]
    assert [label.get_text() for label in exits.get_yticklabels()] == [one["data"] for one in rows]
    for place, (row, study) in enumerate(zip(rows, page["studies"].values(), strict=True)):
        most = max(study["study"]["test_timesteps"])
        tet, sdt = (x * most / 100 for x in exits.lines[3 * place].get_xdata())
        assert tet - sdt == pytest.approx(row["differences"]["exit"]["mean"])
        texts = [text for text in exits.texts if text.xy[1] == place]
        assert [text.get_text() for text in texts] == [f"{tet:.1f}", f"{sdt:.1f}", f"of {most}"]
        assert {text.get_fontweight() == "bold" for text in texts} == {row["holm"]["exit"] < 0.05}
    names = ("spikingjelly, eager", "relu", "tetdist, none", "tetdist, blocks")
    rows = performance["sew_resnet34-bf16"]["rows"]
    times, memory = ({row["name"]: row[key] for row in rows} for key in ("ratio", "kept_mib"))
    assert [bar.get_width() for bar in costs.patches] == pytest.approx(
        [values[name] / values["relu"] for values in (times, memory) for name in names]
    )
