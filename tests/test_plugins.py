"""Files from outside: those of docs/extending.md are run, kept and compared."""

import copy
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
from safetensors.torch import load_file
from tiny import expect, refused

from tetdist import plugins
from tetdist.apps.cli import eval as evaluation
from tetdist.apps.cli import export as exporting
from tetdist.apps.cli import train
from tetdist.errors import UserError
from tetdist.plugins import import_files
from tetdist.storage.checkpoint import load_model_file, write_model_file

PAGE = tiny.PROJECT / "docs" / "extending.md"
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL))
RPROP, LARGE = {"kind": "rprop", "lr": 0.001}, {"data.image_size": 32, "data.resize": 32}
# What makes a run use each of them.
USES = {
    "my_snn.py": {"model": {"name": "my_snn", "arguments": {"width": 4}}},
    "my_plain.py": {"model": {"name": "plain"}},
    "my_neuron.py": {"model.neuron": {"kind": "alif", "decay": 0.6}},
    "my_loss.py": {"loss": {"kind": "late", "arguments": {"power": 2.0}}},
    "my_optimizer.py": {"phases.0.optimizer": RPROP | {"arguments": {"etas": [0.5, 1.1]}}},
    "my_transform.py": {"data.transforms": ["dim"]},
    "my_tracker.py": {"tracking.trackers": ["csv"]},
    "my_spikingjelly.py": {"model": {"name": "sj_sew_resnet18"}} | LARGE,
}
LOOPS = ("loop_torch.py", "loop_accelerate.py", "loop_lightning.py")


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes tiny.yaml with files of the page beside it: ("my_loss.py", {key: value}) -> file."""

    def make(*names, changes=None):
        used = {"imports": list(names)}
        for name in names:
            (tmp_path / name).write_text(FILES[name])
            used |= copy.deepcopy(USES[name])
        return tiny_config(used | (changes or {}))

    return make


def test_every_file_of_the_page_is_tried():
    assert FILES.keys() == {*USES, *LOOPS, "own_parts.py"}


TOGETHER = (
    ("my_snn.py", "my_neuron.py", "my_loss.py", "my_transform.py", "my_tracker.py"),
    ("my_plain.py", "my_optimizer.py"),
)


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_files_of_the_page_train_on_two_processes_as_on_one_and_continue(
    farm, write, tmp_path, names
):
    changes = {"phases.0.epochs": 1, "precision": "fp64", "engine": "torch"}
    file = write(*names, changes=changes)
    expect(farm(file, "name=one"))
    expect(farm(file, "name=two", world=2, stop=("step", 1, signal.SIGTERM)), status=143)
    expect(farm(file, "name=two", world=2), "from step 2")
    one, two = (tiny.metrics(tmp_path / f"runs/{name}", "train") for name in ("one", "two"))
    losses = [line["loss"] for line in one]
    assert [line["loss"] for line in two] == pytest.approx(losses, rel=1e-9)
    run = tmp_path / "runs/two"
    assert {(run / "imports" / name).read_text() for name in names} == {FILES[n] for n in names}
    done = subprocess.run(
        ["sha256sum", "-c", plugins.CHECKSUMS], cwd=run / "imports", capture_output=True
    )
    assert done.returncode == 0
    if "my_tracker.py" in names:
        rows = (tmp_path / "runs/one/losses.csv").read_text().splitlines()
        assert len(rows) == len(one)
        assert "stem.neuron.learned.rise" in load_model_file(run)[0]


def test_network_with_an_argument_layers_and_weights_of_five_dimensions_trains(
    main, tiny_config, tmp_path
):
    text = FILES["my_plain.py"]
    for old, new in (
        (
            "nn.Conv2d(3, 8, 3)",
            "nn.Unflatten(1, (1, 3)), nn.Conv3d(1, layers, 3), nn.Flatten(2, 3)",
        ),
        (
            "num_classes, timesteps):\n        super",
            "num_classes, timesteps, layers):\n        super",
        ),
        ("def plain(pretrained=False, *, ", "def volume(pretrained=False, *, layers, "),
        (
            "**_):\n    return Plain(num_classes, timesteps",
            "**_) -> Plain:\n    return Plain(num_classes, timesteps, layers",
        ),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "volume.py").write_text(text)
    file = tiny_config({"imports": ["volume.py"], "model": {"name": "volume"}, "max_steps": 1})
    refused(main(file), "missing 1 required keyword-only argument: 'layers'")
    refused(main(file, "model.arguments.lairs=8"), "volume has no such argument; did you mean lay")
    expect(main(file, "model.arguments.layers=8"))
    assert load_model_file(tmp_path / "runs/tiny")[0]["layers.1.weight"].ndim == 5


def test_network_of_spikingjelly_on_the_page_trains(main, write):
    expect(main(write("my_spikingjelly.py"), "max_steps=1"))


@pytest.mark.parametrize("script", LOOPS)
def test_own_loop_is_the_trainers(main, farm, tiny_config, tmp_path, script):
    """On two processes; that in plain torch has been stopped on one."""
    optimizer = {"kind": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0}
    phase = {"epochs": 1, "timesteps": 2, "schedule": "constant", "optimizer": optimizer}
    changes = {"phases": [phase], "loss.lambda": 0.05, "precision": "fp64", "engine": "torch"}
    changes["save"] = {"every_steps": 2, "keep_last": 9}
    (tmp_path / "more.py").touch()
    file = tiny_config(changes | {"imports": [str(tmp_path / "more.py")]})
    assert main(file, "name=trainer").status == 0
    for name in (script, "own_parts.py"):
        (tmp_path / name).write_text(FILES[name])
    own = tiny.python(script, file, "name=own")
    stopped = []
    if script == "loop_torch.py":
        stopped = farm.side_by_side(1, [*own, "max_steps=2"], tmp_path)
        checkpoints = (tmp_path / f"runs/{name}/checkpoints" for name in ("own", "trainer"))
        files = (next(one.glob("step-*2")) / "model.safetensors" for one in checkpoints)
        weights, trainers = map(load_file, files)
        assert all(trainers[key].equal(value) for key, value in weights.items())
        ((_, mistyped),) = farm.side_by_side(1, tiny.python(script), tmp_path)
        assert mistyped.startswith(f"error: give a configuration: python {script} loop.yaml")
    outcomes = [*farm.side_by_side(2, own, tmp_path), *stopped]
    assert {status for status, _ in outcomes} == {0}, outcomes
    text = outcomes[0][1]
    own, trainers = (
        load_file(tiny.newest(tmp_path / "runs" / name) / "model.safetensors")
        for name in ("own", "trainer")
    )
    assert own.keys() == trainers.keys()
    for key, value in trainers.items():
        assert (own[key] - value).abs().max() <= 1e-12 * value.abs().max(), key
    top1 = tiny.metrics(tmp_path / "runs/trainer", "val")[-1]["top1"]
    assert f"step 5: top-1 {top1:.2f} %" in text
    assert load_model_file(tmp_path / "runs/own")[1].imports.keys() == {"more.py"}
    evaluate = ["--checkpoint", str(tmp_path / "runs/own"), "--json", str(tmp_path / "found.json")]
    assert evaluation.main([*evaluate, "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["samples"] == sum(tiny.VAL_SIZES)


def test_a_changed_file_is_named(main, write, tmp_path):
    file = write("my_loss.py", changes={"phases.0.epochs": 1})
    assert main(file).status == 0
    (tmp_path / "my_loss.py").write_text(FILES["my_loss.py"] + "\n# changed\n")
    refused(main(file), f"{tmp_path}/my_loss.py is not the my_loss.py that the run began with")
    # Another place is no other file.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "my_loss.py").write_text(FILES["my_loss.py"])
    (elsewhere / "more.py").write_text("")
    moved = [str(elsewhere / "my_loss.py")]
    assert "nothing to do" in main(file, f"imports={moved}").text
    more = main(file, f"imports={[*moved, str(elsewhere / 'more.py')]}")
    refused(more, "more.py was not imported")
    without = refused(main(file, "imports=[]", "loss={kind: tet}"), "my_loss.py is no longer")
    assert "damaged" not in without


def test_import_on_the_command_line(main, tiny_config, tmp_path, capfd):
    (tmp_path / "my_loss.py").write_text(FILES["my_loss.py"])
    file = tiny_config({"phases.0.epochs": 1})
    missing = main(file, "loss.kind=late")
    refused(missing, "loss.kind=late: there is no loss 'late'; ", "--import FILE.py")
    expect(main(file, "loss.kind=late", "--import", str(tmp_path / "my_loss.py")))
    own, importing = tmp_path / "my_neuron.py", tmp_path / "importing.yaml"
    importing.write_text("imports: [my_neuron.py]\n")
    for help_text, flags in (("Gain.", ["--import", own]), ("More.", ["--config", importing])):
        gain = f"    gain: float = neurons.option(1.0, '{help_text}', gt=0)\n\n    def parameters"
        own.write_text(FILES["my_neuron.py"].replace("    def parameters", gain))
        assert train.main([*map(str, flags), "--explain", "model.neuron.gain"]) == 0
        explained = f"[number > 0; default 1.0] (kind=alif only) {help_text}"
        assert explained in capfd.readouterr().out


def test_a_checkpoint_asks_for_its_files_and_imports_none(main, write, tmp_path, capfd):
    changes = {"phases.0.epochs": 1, "precision": "fp32"}
    trained = main(write("my_snn.py", "my_neuron.py", "my_loss.py", changes=changes))
    run = tmp_path / "runs/tiny"
    copies = [f"--import {run}/imports/{name}.py" for name in ("my_snn", "my_neuron")]
    expect(trained, f"eval.py {run} {' '.join(copies)}\n")  # not the loss
    needed = [word for copy in copies for word in copy.split()]
    evaluate = ["--checkpoint", str(run), "--execution", "reference", "--device", "cpu"]
    export = [str(run), "--output", str(tmp_path / "out"), "--format", "safetensors"]
    for command, arguments in ((evaluation.main, evaluate), (exporting.main, export)):
        for name in [name for name in sys.modules if name.startswith(plugins.PACKAGE)]:
            del sys.modules[name]
        capfd.readouterr()
        assert command(arguments) == 2
        errors = capfd.readouterr().err
        assert f"add {' '.join(copies)} if" in errors
        assert f"{plugins.PACKAGE}.my_snn" not in sys.modules
        assert command([*arguments, *needed]) == 0
        (tmp_path / "my_snn.py").write_text(FILES["my_snn.py"] + "\n")
        status = command([*arguments, "--import", str(tmp_path / "my_snn.py"), *needed[2:]])
        assert status in (0, 2)  # export does not replace what it has written


MIXING = """
import torch
class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('on', torch.zeros(()))
    def forward(self, x):
        return x.relu() + self.on * x.softmax(0)
"""


def test_network_that_mixes_samples_is_neither_trained_nor_evaluated_nor_exported(
    main, write, tiny_root, tmp_path, capfd
):
    """In the last part, a buffer of the weights switches the mixing on."""
    changes = {"phases.0.epochs": 1, "precision": "fp32", "model.name": "toy"}
    file, source = write("my_plain.py", changes=changes), tmp_path / "my_plain.py"
    apart = FILES["my_plain.py"].replace("def plain(", "def toy(")
    refusal, imports = "toy mixes the samples of a batch", ["--import", str(source)]

    def use(name, weights=None):
        run = str(weights or tmp_path / "runs" / name)
        data = ["--data", str(tiny_root), "--device", "cpu"]
        evaluated = evaluation.main(["--checkpoint", run, *data, *imports])
        form = ["--format", "safetensors", "--output", str(tmp_path / f"{name}.safetensors")]
        return evaluated, exporting.main([run, *form, *imports])

    source.write_text(apart)
    assert main(file, "name=apart").status == 0
    source.write_text(apart.replace("nn.ReLU()", "nn.Softmax(0)"))
    assert use("apart") == (2, 2)
    assert capfd.readouterr().err.count(refusal) == 2
    refused(main(file, "name=mixing"), refusal)
    assert main(file, "name=mixing", "model.mixes_samples=true").status == 0
    assert use("mixing") == (0, 0)
    source.write_text(apart.replace("nn.ReLU()", "Mixing()") + MIXING)
    expect(main(file, "name=first"))
    weights, description = load_model_file(tmp_path / "runs/first")
    changed = {key: value + key.endswith(".on") for key, value in weights.items()}
    write_model_file(on := tmp_path / "on.safetensors", changed, description)
    for key in ("init_checkpoint", "loss.distillation.teacher"):
        refused(main(file, "name=next", f"{key}={on}", "loss.distillation.weight=0.5"), refusal)
    assert use("given", on) == (2, 2)
    assert capfd.readouterr().err.count(refusal) == 2


LOSS = "from tetdist.losses import register_loss\n@register_loss('{0}')\ndef {0}(logits, {1}"
MODEL = "from timm.models import register_model\n@register_model\ndef {}(**_): ...\n"
RELU = MODEL.replace("...", "from torch import nn; return nn.ReLU({})")
OPTIMIZER = (
    "from tetdist.optimizers import register_optimizer\n@register_optimizer('none')\n"
    "def none(groups, section): ..."
)
NEURON = (
    "import torch\nfrom dataclasses import dataclass\nfrom tetdist.nn import neurons\n"
    "from tetdist.nn.neurons import LIF, NEURONS\n"
    "@NEURONS.register('own')\n{}class Own(LIF):\n    {}\n"
)
DATACLASS = "@dataclass(frozen=True, kw_only=True)\n"
# Files that are refused when they are imported.
BAD = {
    "raise LookupError('of mine')": "bad.py:1 raises LookupError: of mine",
    "import sys\nsys.exit('bye')": "bad.py:2 raises SystemExit: bye",
    "x = (": "bad.py:1 raises SyntaxError",
    "import no_such_package": "No module named 'no_such_package'",
    "import helpers": "'helpers'; import that file first, and write `from tetdist_imports.helpers",
    LOSS.format("tet", "target): ..."): "the loss 'tet', which tetdist.losses has registered",
    MODEL.format("nasnetalarge"): "'nasnetalarge', which timm.models.nasnet has registered",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_file_is_one_sentence(tmp_path, text):
    (tmp_path / "helpers.py").touch()
    (tmp_path / "bad.py").write_text(text + "\n")
    with pytest.raises(UserError, match=re.escape(BAD[text])):
        import_files([tmp_path / "bad.py"])
    assert f"{plugins.PACKAGE}.bad" not in sys.modules


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.py")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text("")
    for names, expected in (
        (["pipe.py"], r"pipe.py cannot be read \(It is a pipe, a device"),
        (["nothing.py"], "nothing.py cannot be read .*; correct it"),
        (["a/sam.py"], r"No such file or directory\); did you mean .*/a/same.py\?"),
        (["my-snn.py"], "named in one word"),
        (["a/same.py", "b/same.py"], "have the same name"),
    ):
        with pytest.raises(UserError, match=expected):
            import_files([tmp_path / name for name in names])


def test_one_file_may_use_another(tmp_path):
    (tmp_path / "helpers.py").write_text("answer = 42\n")
    (tmp_path / "uses.py").write_text("from tetdist_imports.helpers import answer\n")
    import_files([tmp_path / "helpers.py", tmp_path / "uses.py"])
    assert sys.modules[f"{plugins.PACKAGE}.uses"].answer == 42


TO_RPROP = "phases.0.optimizer={kind: rprop, lr: 0.1, arguments: {foo: 1}}"
HEADLESS = FILES["my_snn.py"].replace("my_snn", "headless").replace("self.set_s", "# self.set_s")
HIDDEN = FILES["my_snn.py"].replace("my_snn", "hidden").replace("self.set_h", "# self.set_h")
DEEPER = FILES["my_snn.py"].replace("my_snn", "deeper").replace("(width, 2", "(1 + width, 2")
WITHOUT_T = FILES["my_plain.py"].replace("return logits if per_timestep else ", "return ")
SMOOTH = LOSS.format("f", "y, gamma, label_smoothing=0): return gamma + label_smoothing")
PER_TIMESTEP = """parameters, over_time = lambda self, c: {'g': torch.ones(2)}, frozenset('g')
    def run(self, x, u, g): return torch.stack([(w * y).relu() for w, y in zip(g, x)]), x[0]"""
OWN = {
    "width: float = 1.0": "no description; declare it as width: float = neurons.option(1.0, ",
    "def parameters(self, c): return {'w': torch.ones(3)}": "of Own has the shape (3,); it must be",
    "def run(self, x, u): return (x > 1).double(), x[0]": "own passes no gradient; make its",
    "def run(self, x, u): return x.abs().sqrt(), x[0]": "own passes a gradient that is not finite",
    "def run(self, x, u): return x.relu()": "own returns one tensor; return (spikes, membrane)",
    "def run(self, x, u): return x.relu()[1:], x[0]": "own returns spikes of another shape than",
    "def run(self, x, u): return x.relu(), x[:2]": "without the 7 samples on axis sample_axis=0",
    "def run(self, x, u): return x.nothing": "raises AttributeError; ",
    PER_TIMESTEP: "own gives other spikes if it continues from the membrane",
    "w: float = neurons.option(1.0, '', min=0)": "bad.py:8 raises AssertionError: bounds are gt",
    "def run(self, x, u): return x.cumsum(0).relu(), x[0]": "own gives other spikes if it",
}
# What makes a run use a file, the file, and what is said of it.
LATER = [
    ("loss.kind=a", LOSS.format("a", "y): return logits.mean((0, 2))"), "has the shape (2,), not"),
    ("loss.kind=b", LOSS.format("b", "y): return 0.5"), "returns 0.5, not a tensor of the shape"),
    ("loss.kind=c", LOSS.format("c", "y): return logits.detach().mean()"), "c has no gradient"),
    ("loss.kind=own", LOSS.format("b", "y): ..."), "--import FILE.py; not registered in bad.py"),
    ("loss.kind=d", LOSS.format("d", "y, epoch): ..."), "'epoch'; set any other parameter in"),
    ("loss={kind: f, label_smoothing: 0.5, arguments: {gamma: 2}}", SMOOTH, "returns 2.5, not a"),
    ("loss={kind: f, lambda: 0.1, arguments: {gamma: 2}}", SMOOTH, "loss.lambda has no effect"),
    *(("model.neuron.kind=own", NEURON.format(DATACLASS, body), OWN[body]) for body in OWN),
    ("model.neuron.kind=own", NEURON.format("", "a: float = 1.0"), f"put {DATACLASS[:-1]} above"),
    ("model={name: a}", RELU.format("a", "**_"), "pass on neuron alone"),
    ("model={name: b}", RELU.format("b", ""), "no timesteps, no set_timesteps, no num_classes, no"),
    ("model={name: none}", MODEL.format("none"), "the function none must return a network"),
    ("model={name: plain}", WITHOUT_T, "with per_timestep=True it must return logits (2, 2, 4)"),
    ("model={name: headless}", HEADLESS, "MySNN: call set_stages() before set_head()"),
    ("model={name: hidden}", HIDDEN, "MySNN: call set_head() at the end of __init__"),
    ("model={name: deeper}", DEEPER, "in blocks.0.conv of deeper ... may be the cause"),
    (TO_RPROP, FILES["my_optimizer.py"], "rprop cannot be built with arguments {'foo': 1}"),
    ("phases.0.optimizer.kind=none", OPTIMIZER, "kind: none returns None, not an optimiser"),
    ("phases.0.optimizer.kind=adma", "", "there is no optimiser 'adma'; did you mean adam"),
    ("phases.0.optimizer.kind=timm:adahessian", "", "needs second derivatives"),
]


@pytest.mark.parametrize(("use", "text", "expected"), LATER)
def test_a_mistake_that_shows_later_is_one_sentence(
    main, tiny_config, monkeypatch, use, text, expected
):
    file = tiny_config({"imports": ["bad.py"]})
    monkeypatch.setattr("tempfile.tempdir", str(file.parent))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file.with_name("bad.py").write_text(text)
    refused(main(file, use), *expected.split(" ... "))


# What makes a run use a file that raises an error in a step, the file, its line, and its part.
RAISING = [
    ("loss.kind=e", LOSS.format("e", "y): return logits + y.new_zeros(7)"), 3, "loss.kind"),
    (
        "model={name: raising}",
        FILES["my_plain.py"]
        .replace("def plain(", "def raising(")
        .replace("self.fc(self", "self.fc(self.layers[3] if self.training else self"),
        23,
        "model.name",
    ),
]


@pytest.mark.parametrize(("use", "text", "line", "part"), RAISING, ids=lambda one: str(one)[:20])
def test_an_error_in_a_users_file_shows_its_lines_alone(
    main, tiny_config, tmp_path, use, text, line, part
):
    (bad := tmp_path / f"bad_{part.split('.')[-2]}.py").write_text(text)
    file = tiny_config({"imports": [bad.name], "precision": "fp32"})
    outcome = main(file, use)
    whole = tmp_path / "runs/tiny/traceback.txt"
    refused(outcome, f"{bad} ({part}) raises ", f"Error; {whole} has the whole traceback")
    shown = re.findall(r'File "(.*)", line (\d+)', outcome.text)
    assert shown == [(str(bad), str(line))]
    assert "Traceback" in whole.read_text()
