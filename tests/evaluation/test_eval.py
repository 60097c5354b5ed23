"""tools/eval.py counts every sample once and agrees with plain torch on a checkpoint."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import Farm, Tool, expect

from tetdist.apps.reports import evaluation_page, style
from tetdist.apps.weights import integers
from tetdist.apps.weights.integers import convert
from tetdist.apps.weights.trained import load
from tetdist.datasets.index import index_splits
from tetdist.evaluation import early_exit
from tetdist.evaluation.early_exit import ChosenExit, ExitChoice
from tetdist.evaluation.results import EvalResult
from tetdist.storage.checkpoint import load_model_file

NUM_SAMPLES = sum(tiny.VAL_SIZES)


@pytest.fixture(scope="module")
def run(farm: Farm, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run at T=3, a little better than chance."""
    folder = tmp_path_factory.mktemp("evaluated")
    changes = {"phases.0.timesteps": 3, "phases.0.epochs": 4, "evaluate_every": 2}
    expect(farm(tiny.write_config(folder / "tiny.yaml", tiny_root, changes)))
    return folder / "runs" / "tiny"


@pytest.fixture
def evaluate(output_of: Callable[..., str]) -> Callable[..., str]:
    """Runs the tool in this process, which succeeds: its output."""
    return partial(output_of, "eval", "--execution", "reference", "--device", "cpu")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[EvalResult]:
    """What the tool shows, one after the other."""
    shown: list[EvalResult] = []
    as_text = evaluation_page.as_text
    monkeypatch.setattr(
        evaluation_page, "as_text", lambda result: shown.append(result) or as_text(result)
    )
    return shown


@pytest.fixture
def broken(tool: Tool) -> Callable[..., str]:
    """Runs the tool in this process, which a user's mistake ends: standard error."""

    def fail(*options: object) -> str:
        status, out, err = tool("eval", *options)
        assert (status, out) == (2, ""), out + err
        assert "error:" in err
        assert "Traceback" not in err
        return err

    return fail


def plain_logits(
    run: Path, root: Path, timesteps: int = 3, network: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, N, K) and labels of the validation images, without tetdist's pipeline."""
    import timm
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    model = timm.create_model(
        "spiking_convnet", channels=(4, 8), input_size=16, num_classes=4, timesteps=timesteps
    )
    model.set_execution("reference")
    model.load_state_dict(load_file(tiny.newest(run) / "model.safetensors"))
    model.eval()
    crop = v2.Compose(
        [
            v2.Resize(16, antialias=True),
            v2.CenterCrop(16),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images, labels = [], []
    for label, name in enumerate(tiny.CLASSES):
        for file in sorted((root / "val" / name).iterdir()):
            pixels = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
            images.append(crop(tv_tensors.Image(pixels)))
            labels.append(label)
    with torch.no_grad():
        model = network or model
        logits = torch.cat([model(x[None], per_timestep=True) for x in torch.stack(images)], 1)
    return logits, torch.tensor(labels)


def test_whole_numbers_are_evaluated_beside_real_ones(
    evaluate, broken, run, tiny_root, tmp_path, monkeypatch
):
    def found(*options: object) -> tuple[dict[str, Any], str]:
        file = tmp_path / "found.json"
        out = evaluate("--checkpoint", run, "--json", file, "--batch", 5, *options)
        return json.loads(file.read_text()), out

    real, (whole, out) = found()[0], found("--int8")
    assert whole["real_numbers"]["top1"] == real["top1"]
    logits, labels = plain_logits(run, tiny_root, network=convert(load(run), 3))
    top1 = 100 * (logits.mean(0).argmax(1) == labels).float().mean().item()
    assert whole["top1"] == pytest.approx(top1, abs=100.1 / NUM_SAMPLES)
    assert "--int8 counts neither operations nor spikes" in out
    changed = whole["real_numbers"]["changed"]
    assert NUM_SAMPLES / 4 > changed >= abs(whole["top1"] - real["top1"]) * NUM_SAMPLES / 100 - 0.1
    assert f"top-1 {real['top1']:.2f} %; different decisions: {changed} of {NUM_SAMPLES}" in out
    # Ranges are proven for the largest T that is asked for.
    assert found("--int8", "--timesteps", "1,5")[0]["timesteps"] == 5
    # A network that always prefers the least likely class decides otherwise.
    reversed_network = convert(load(run), 3)
    reversed_network.description["logit"] *= -1
    monkeypatch.setattr(integers, "convert", lambda *_: reversed_network)
    assert found("--int8")[0]["real_numbers"]["changed"] == NUM_SAMPLES
    int8_and_energy = broken("--checkpoint", run, "--int8", "--energy", "x")
    assert "--int8 does not support --energy" in int8_and_energy


def test_numbers_are_those_of_plain_torch(run, tiny_root, evaluate, tmp_path):
    out = evaluate("--checkpoint", run, "--json", tmp_path / "e.json", "--batch", 4)
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["samples"] == NUM_SAMPLES
    logits, labels = plain_logits(run, tiny_root)
    top1, loss = [], []
    for t in (1, 2, 3):
        mean = logits[:t].mean(0)
        top1.append(100 * float((mean.argmax(-1) == labels).double().mean()))
        loss.append(float(torch.nn.functional.cross_entropy(mean, labels)))
    # The two resize filters differ by a grey level here and there: at most one sample flips.
    assert result["per_timestep_top1"] == pytest.approx(top1, abs=100.1 / NUM_SAMPLES)
    assert result["per_timestep_loss"] == pytest.approx(loss, rel=0.03)
    assert len(set(top1)) > 1
    assert result["top1"] == result["per_timestep_top1"][-1]
    assert result["loss"] == result["per_timestep_loss"][-1]
    assert result["top5"] == 100.0
    assert result["firing_rate"].keys() == {"stem.neuron", "blocks.0.neuron"}
    assert all(0 < rate < 1 for rate in result["firing_rate"].values())
    for number in result["per_timestep_top1"]:
        assert f"{number:.2f}" in out
    # Training reported the same for the same weights.
    last = tiny.metrics(run, "val")[-1]
    for key in ("samples", "top1", "top5", "loss", "per_timestep_top1", "firing_rate"):
        assert result[key] == pytest.approx(last[key], rel=1e-6), key


def test_what_is_decided_and_what_it_takes(run, evaluate, results, tmp_path):
    """At the T of training, 3, though the table of T goes beyond; or at the one T that is given."""
    by_timesteps = {}
    for timesteps in ("2", "4", "5,1", "3", "1-3,5"):
        file = tmp_path / "e.json"
        options = ("--json", file, "--timesteps", timesteps)
        out = evaluate("--checkpoint", run, *options)
        by_timesteps[timesteps] = json.loads(file.read_text())
    *fewer, beyond, alone, found = by_timesteps.values()
    assert (beyond["timesteps"], alone["timesteps"], found["timesteps"]) == (5, 3, 3)
    assert beyond["reported_timesteps"] == [1, 5]
    # One pass at the largest T against a pass of its own at each T.
    for t, one in zip((2, 4), fewer, strict=True):
        assert one["top1"] == beyond["per_timestep_top1"][t - 1]
        assert one["loss"] == pytest.approx(beyond["per_timestep_loss"][t - 1], rel=1e-6)
    assert found["trained_timesteps"] == 3
    assert found["reported_timesteps"] == [1, 2, 3, 5]
    for key in alone.keys() - {"reported_timesteps"}:
        if key.startswith("per_timestep_"):
            rows = [*alone[key], *beyond[key][3:]]
            assert found[key] == pytest.approx(rows, rel=1e-6)
        else:
            assert found[key] == alone[key]
    assert [sum(row) for row in found["confusion"]] == list(tiny.VAL_SIZES)
    right = sum(row[k] for k, row in enumerate(found["confusion"]))
    assert found["top1"] == pytest.approx(100 * right / NUM_SAMPLES)
    assert [row["class"] for row in found["per_class"]] == list(tiny.CLASSES)
    assert found["per_class"][2]["recall"] == pytest.approx(100 * found["confusion"][2][2] / 6)
    spent = [point["mean_timesteps"] for point in found["early_exit"]]
    assert spent == sorted(spent)
    assert spent[-1] <= 3
    # 3 channels to 4 over 16x16 pixels, once for all timesteps, by hand: 46 of 48 rows reached.
    layers = found["operations"]["layers"]
    assert layers["stem.conv"]["multiply_accumulates"] == 46 * 46 * 3 * 4
    assert layers["stem.conv"]["accumulates"] == 0
    # Each spike of the last layer reaches each class.
    spikes = found["firing_rate"]["blocks.0.neuron"] * 3 * 8 * 8 * 8
    assert layers["fc"]["accumulates"] == pytest.approx(4 * spikes)
    assert "multiply-accumulates a sample at T = 3" in out
    assert f"{NUM_SAMPLES} samples of val" in out
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if len(row) == 3 and row[0].isdigit()] == ["1", "2", "3", "5"]
    # Top-5 of four classes says nothing.
    summary = f"loss {found['loss']:.4f} at T=3; trained at T=3"
    summary = f"top-1 {found['top1']:.2f} %, {summary}"
    assert "top-5" not in out
    assert summary in out
    assert summary in evaluation_page.html_page(results[-1])
    axis = style.new_figure(4, 4).subplots()
    evaluation_page._draw_exits(results[-1], axis)
    assert axis.get_lines()[1].get_xdata()[-1] == 3


def test_report(run, evaluate, results, tmp_path):
    page, constants = tmp_path / "page.html", tmp_path / "constants.yaml"
    constants.write_text("hops: 0.5\nweight_fetches: sample\n")
    options = ("--report", page, "--json", tmp_path / "e.json", "--energy", constants)
    out = evaluate("--checkpoint", run, "--timesteps", "1,4", *options)
    found = json.loads((tmp_path / "e.json").read_text())
    energy, text = found["energy"], page.read_text()
    assert text.startswith("<!doctype html>")
    assert (energy["constants"]["hops"], energy["changed"]) == (0.5, ["hops", "weight_fetches"])
    for part in (out, text):
        for word in ("spiking_convnet", *tiny.CLASSES, "arithmetic only, fp32, 45 nm"):
            assert word in part
        assert "changed by --energy: hops=0.5, weight_fetches=sample" in part
        for number in (energy["relu"]["pj"]["total"], energy["arithmetic_only_pj"]["spiking"]):
            assert f"{number / 1e6:.4g}" in part
        assert f"{100 * energy['spike_rate']:.3g} %" in part
        assert "All numbers below are at T=4 unless a T is given" in part
        assert part.index("Accuracy at each T") < part.index("Early exit") < part.index("Energy")
    # Nothing is fetched from elsewhere, and nothing is run.
    assert text.count("src=") == text.count('src="data:image/png;base64,') == 5
    assert not any(word in text for word in ("http", "<script", "<link", "@import", "url("))
    written = {path.name for path in tmp_path.iterdir()} - {constants.name}
    assert written == {"e.json", "page.html"}
    named = replace(results[0].per_class[0], name="<script>alert(1)</script>")
    result = replace(results[0], classes=[named.name] * 4, per_class=[named])
    assert "&lt;script" in evaluation_page.html_page(result)
    assert "<script" not in evaluation_page.html_page(result)


def test_what_samples_exclude_depends_on_the_losses_among_them():
    """Up to Clopper and Pearson's bounds of 2, 5, 20 and 11 losses, of one side and 90 %."""
    for threshold, samples, top1, lost, within, words in (
        (0.9, 400, 99, 1, 0.5, " became wrong, and up to 2 may. Elsewhere up to 1.33 % may become"),
        (0.9, 1000, 99, 5, 0.4, "5 of the 1,000 became wrong. Elsewhere up to 0.925 % may become "),
        (0.9, 4000, None, 7, 0.5, "and up to 20 may. Elsewhere up to 0.676 % may change (90 % "),
        (0.3, 4000, None, 11, 2, "11 of the 4,000 changed. Elsewhere up to 0.415 % may change (90"),
    ):
        chosen = ChosenExit(ExitChoice(within, threshold, samples, top1, lost), 97.0, 1.5)
        assert words in evaluation_page._of_chosen_exit(chosen, "val", 98.0)


def test_a_threshold_of_early_exit_is_chosen_on_what_was_held_out(
    main, tiny_root, tiny_config, evaluate, broken, run, tmp_path, monkeypatch
):
    held = 4 * 3  # a quarter of the 11 or 12 training samples of each class
    expect(main(tiny_config({"data.held_out": 0.25, "phases.0.timesteps": 3})))
    trained, found = tmp_path / "runs" / "tiny", {}
    for within in (0, 5, 100):
        file = tmp_path / f"{within}.json"
        options = ("--exit-within", within, "--measured", "--timesteps", "3", "--batch", "4")
        out = evaluate("--checkpoint", trained, "--json", file, *options)
        found[within] = json.loads(file.read_text())
        chosen = found[within]["chosen_exit"]
        assert f"loses at most {within} points on {held} held-out training samples. On val" in out
        row = rf"\n *{chosen['threshold']:.4g} \(chosen\) +{chosen['top1']:.2f} "
        assert re.search(row, out)
        assert ("; to show at most 5 %, choose on at least 45" in out) == (within == 5)
        assert f"at T = {chosen['mean_timesteps']:.3f} on average" in out
        # It is chosen on other samples than it is judged by, and the run saw them as these.
        own = tiny.metrics(trained, "val")[-1]
        assert f"{chosen['chosen_on'].pop('lost')} of the {held} became wrong" in out
        assert chosen["chosen_on"] == {"samples": held, "top1": own["top1"]}
        assert own["samples"] == held
        assert found[within]["samples"] == NUM_SAMPLES
        # Samples that leave the batch are decided as those that stay in the whole pass.
        measured = found[within]["measured_exit"]
        assert measured["differing"] == measured["differing_within_1e-5"] == 0
        for key in ("top1", "mean_timesteps"):
            assert measured[key] == pytest.approx(chosen[key], abs=1e-9)
        rates = measured["images_per_s"], measured["whole_pass_images_per_s"]
        assert rates[0] / rates[1] == pytest.approx(measured["ratio"])
        assert f"{measured['ratio']:.2f} times the {rates[1]:.1f} of whole passes" in out
        # The curve beside it stays what it is without.
        assert len(found[within]["early_exit"]) == 8
    spent = [found[within]["chosen_exit"]["mean_timesteps"] for within in (0, 5, 100)]
    assert 3 >= spent[0] >= spent[1] >= spent[2] >= 1
    # At 0.3 nearly all of four classes are decided at once.
    assert found[100]["chosen_exit"]["threshold"] == 0.3
    # In integers, too.
    evaluate("--checkpoint", trained, "--json", file, "--int8", *options)
    in_integers = json.loads(file.read_text())
    assert in_integers["measured_exit"]["differing"] == 0
    assert in_integers["measured_exit"]["top1"] == in_integers["chosen_exit"]["top1"]
    # Other classes or timesteps are counted.
    decide = early_exit.decide
    for wrong in (lambda c, t: (3 - c, t), lambda c, t: (c, t + 1)):
        monkeypatch.setattr(early_exit, "decide", lambda *x, wrong=wrong: wrong(*decide(*x)))
        evaluate("--checkpoint", trained, "--json", file, *options)
        measured = json.loads(file.read_text())["measured_exit"]
        assert (measured["differing"], measured["differing_within_1e-5"]) == (NUM_SAMPLES, 0)
    # Samples without labels, in folders of any names, and more of these than classes.
    for i, image in enumerate(sorted((tiny_root / "val").rglob("*.png"))):
        folder = tmp_path / "today" / "frames" / f"{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{i}.png")
    index_splits(tmp_path / "today", ("frames",))
    there = ("--exit-within", 0, "--exit-on", tmp_path / "today" / "frames", "--timesteps", "3")
    out = evaluate("--checkpoint", run, "--json", file, *there)
    assert f"changes at most 0 % of the decisions on {NUM_SAMPLES} unlabelled samples" in out
    chosen = json.loads(file.read_text())["chosen_exit"]
    assert chosen["chosen_on"] == {"samples": NUM_SAMPLES, "top1": None, "lost": 0}
    # These are the evaluated samples, so none of their decisions changes.
    assert chosen["top1"] == json.loads(file.read_text())["top1"]
    for split, words in (("val", "is the evaluated split"), ("train", "holds samples of the")):
        there = ("--exit-within", 0, "--exit-on", tiny_root / split)
        out = evaluate("--checkpoint", run, "--json", file, *there)
        assert f'"warning": "--exit-on {words}' in file.read_text()
        assert f" changed. Warning: --exit-on {words}" in out
    page = tmp_path / "page.html"
    evaluate("--checkpoint", trained, "--exit-within", 5, "--report", page)
    assert f"on {held} held-out training samples" in page.read_text()
    # The validation split alone, elsewhere, has nothing of what was held out.
    shutil.copytree(tiny_root / "val", tmp_path / "elsewhere" / "val")
    index_splits(tmp_path / "elsewhere", ("val",))
    elsewhere = ("--data", tmp_path / "elsewhere")
    for arguments, message in (
        (("tetdist:quickstart", "--exit-within", "1"), "train with data.held_out=0.1"),
        (("--checkpoint", run, "--measured"), "--measured needs the early exit of --exit-within"),
        (("--checkpoint", run, "--exit-on", "x"), "add --exit-within POINTS"),
        ((run, "data.root=/data"), "data.root=/data; use --data, not keys"),
        ((run, "--checkpoint", run), "--checkpoint: not allowed with argument RUN_OR_FILE"),
        ((run, "--exit-within", 1, "--exit-on", tiny_root), f"such as {tiny_root / 'val'}, not "),
        ((run, "--exit-within", 1, "--exit-on", tmp_path), f"{tmp_path}/elsewhere/val, not "),
        (("--checkpoint", trained, "--exit-within", "1", *elsewhere), "which needs none of them"),
    ):
        assert message in broken(*arguments)


WITHOUT = """
import runpy, sys
for name in [name for name in sys.modules if name.partition(".")[0] == "tetdist"]:
    del sys.modules[name]
sys.modules |= dict.fromkeys(("deepspeed", "mlflow", "matplotlib"))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_command_without_deepspeed_and_mlflow(farm, run, tmp_path):
    """Neither may even be importable."""
    command = tiny.python("-c", WITHOUT, tiny.EVAL, run, "--json", tmp_path / "e.json")
    ((status, output),) = farm.side_by_side(1, command, tmp_path)
    assert status == 0, output
    assert json.loads((tmp_path / "e.json").read_text())["samples"] == NUM_SAMPLES


def leaves(found: Any) -> list[Any]:
    """All keys and values, however nested."""
    if isinstance(found, dict):
        return [leaf for pair in found.items() for one in pair for leaf in leaves(one)]
    return [leaf for one in found for leaf in leaves(one)] if isinstance(found, list) else [found]


def test_three_processes_give_the_same_json(farm, run, evaluate, tmp_path):
    """There are two batches, so one process has none."""
    one, three = tmp_path / "1.json", tmp_path / "3.json"
    common = ("--checkpoint", run, "--batch", 12)
    evaluate(*common, "--json", one)
    command = tiny.python(
        tiny.EVAL, *common, "--execution", "reference", "--device", "cpu", "--json", three
    )
    ended = farm.side_by_side(3, command, tmp_path)
    output = "".join(text for _, text in ended)
    assert [status for status, _ in ended] == [0, 0, 0], output
    ours, theirs = json.loads(one.read_text()), json.loads(three.read_text())
    assert ours["samples"] == theirs["samples"] == NUM_SAMPLES
    assert leaves(theirs) == pytest.approx(leaves(ours))
    assert ours["per_timestep_top1"] == theirs["per_timestep_top1"]
    assert output.count("firing rate") == 1


def test_what_would_fail_after_it_fails_before(run, tiny_root, broken, tmp_path, monkeypatch):
    for arguments, message in (
        (("--json", tmp_path / "no" / "e.json"), "--json: cannot write"),
        (("--json", tmp_path), f"--json: cannot write {tmp_path}: name a file in a folder"),
        (("--report", tmp_path / "no" / "page.html"), "--report: cannot write"),
        (("--energy", tmp_path / "no.yaml"), "--energy: "),
    ):
        assert message in broken("--checkpoint", run, *arguments)
    kept = tmp_path / "kept.json"
    kept.write_text("earlier")
    none = ("--checkpoint", tmp_path / "none", "--json", kept)
    assert "none; give a run folder or" in broken(*none)
    assert "is a data folder" in broken(tiny_root)
    monkeypatch.chdir(run.parents[1])  # a checkout may hold runs/quickstart
    assert "did you mean tetdist:quickstart?" in broken("quickstart")
    assert f"did you mean runs/{run.name}?" in broken("--checkpoint", f"{run.name}x")
    assert "train with data.held_out" in broken(run.name, "--exit-within", 1)
    assert kept.read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_file_alone_is_enough_wherever_the_data_is(run, tiny_copy, evaluate, tmp_path):
    """A model file that was copied, and data that moved away."""
    file = tmp_path / "model.safetensors"
    shutil.copy(tiny.newest(run) / "model.safetensors", file)
    moved = tmp_path / "other" / "place"
    moved.parent.mkdir()
    tiny_copy.rename(moved)
    results = []
    for options in (
        ("--checkpoint", file, "--data", moved),
        ("--checkpoint", tiny.newest(run)),
        ("--checkpoint", run / "checkpoints"),
    ):
        target = tmp_path / "e.json"
        evaluate(*options, "--json", target)
        results.append(json.loads(target.read_text()) | {"checkpoint": ""})
    assert results[0] == results[1] == results[2]
    (moved / "index").rename(tmp_path / "index")
    options = ("--data", moved, "--index", tmp_path / "index", "--json", target)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    third, fourth = sorted((copy / "checkpoints").glob("step-*"))  # of the epochs
    assert load_model_file(third)[1].validation is None
    third.rename(third.with_name("step-99999999"))
    (copy / "checkpoints" / "best").write_text("of an earlier version")
    for which, step in (((), third.name), (("--best",), fourth.name)):
        evaluate("--checkpoint", copy, *which, *options)
        assert step == f"step-{json.loads(target.read_text())['step']:08}"


def test_weights_of_somebody_else_ask_for_the_data(run, broken, tmp_path, monkeypatch):
    """An export names no place of the data; one of that name may be here by chance."""
    from tetdist.apps.cli import export

    file = tmp_path / "model.safetensors"
    assert export.main([str(run), "--format", "safetensors", "--output", str(file)]) == 0
    monkeypatch.chdir(tmp_path)
    for folder in ("elsewhere", "data"):
        (tmp_path / folder).mkdir()
        message = broken("--checkpoint", file)
        assert "does not name its data; give --data FOLDER" in message
    made = "make it with `python tools/digits.py data/digits`, or give --data FOLDER"
    assert made in broken("tetdist:quickstart")


def test_some_of_the_classes_are_found_by_their_names_and_reported_as_a_subset(
    run, tiny_copy, evaluate, broken, tmp_path
):
    from tetdist.datasets import index

    file, page = tmp_path / "e.json", tmp_path / "e.html"
    evaluate("--checkpoint", run, "--json", file)
    whole = json.loads(file.read_text())
    assert "subset" not in whole
    # As a folder of another name, and of one class whose label there is not that of the training.
    for split, names in (("val", ["left", "up"]), ("Test", ["right"])):
        folder = tmp_path / split
        for name in names:
            shutil.copytree(tiny_copy / "val" / name, folder / split / name)
        index.index_splits(folder, [split])
        options = ("--data", folder, "--split", split, "--json", file, "--report", page)
        out = evaluate("--checkpoint", run, *options)
        found = json.loads(file.read_text())
        assert found["subset"] == names
        labels = [tiny.CLASSES.index(name) for name in names]
        assert found["samples"] == sum(tiny.VAL_SIZES[k] for k in labels)
        for k, row in enumerate(found["confusion"]):
            assert row == (whole["confusion"][k] if k in labels else [0] * len(tiny.CLASSES))
        right = sum(whole["confusion"][k][k] for k in labels)
        assert found["top1"] == pytest.approx(100 * right / found["samples"])
        words = f"with {len(names)} of the 4 classes of the network ({', '.join(names)}); it chose"
        assert f"{words} among all 4" in out
        assert f"{words} among all 4" in page.read_text()
    message = broken("--checkpoint", run, "--data", tmp_path / "Test")
    assert "has no split 'val', only Test, which" in message


def test_bad_data(run, tiny_copy, broken, tmp_path, event_root):
    from tetdist.datasets import index

    def problem(*options: object) -> str:
        return broken("--checkpoint", run, "--data", tiny_copy, *options)

    none = tmp_path / "none"
    message = broken("--checkpoint", run, "--data", none)
    assert f"--data: {none} does not exist; give the data folder" in message
    index.index_splits(event_root(), kind="events")
    message = broken("--checkpoint", run, "--data", tmp_path / "events")
    assert "holds events; give a folder of images" in message
    assert "has no split 'test', only train, val, which" in problem("--split", "test")
    (tiny_copy / "val/up").rename(tiny_copy / "val/top")
    assert "val/" in problem()
    index.index_splits(tiny_copy, ["val"])
    text = problem()
    assert "other classes" in text
    assert "top" in text


@pytest.mark.parametrize("options", ["", *(f"x --timesteps {t}" for t in ("0", "3-1,2", "1-"))])
def test_bad_command_line(options, broken):
    broken(*options.split())
