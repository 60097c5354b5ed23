"""tools/export.py writes the trained network, for any program that runs it."""

import json
import re
import sys

import nir
import numpy as np
import onnxruntime
import pytest
import timm
import tiny
import torch
import yaml
from kernel_runs import randomize
from safetensors.torch import load_file
from spikingjelly.activation_based import nir_exchange
from torch import nn

from tetdist.apps.weights import export
from tetdist.apps.weights.nir_graph import to_nir
from tetdist.apps.weights.trained import Trained, load
from tetdist.config.loading import parse
from tetdist.errors import UserError, pip_install
from tetdist.storage import checkpoint

T = 3
IF = {"decay": 1.0, "threshold": 0.5, "surrogate": "atan", "surrogate_width": 2.0}
LIF = {"decay": 0.75, "threshold": 0.5}
RESNET19 = {"width": 4, "stem_width": 3, "hidden_features": 6}
CONVNET = {"channels": [4, 6, 8], "input_size": 12}
# Each family and each kind of block, connect function, neuron and pooling.
NETWORKS = {
    "sew, add": ("sew_resnet18", {"width": 4}, LIF, 32),
    "sew bottleneck, IF": ("sew_resnet50", {"width": 2}, IF, 32),
    "sew, and": ("sew_resnet18", {"width": 4, "connect_function": "and"}, IF, 32),
    "sew, iand": ("sew_resnet18", {"width": 4, "connect_function": "iand"}, IF, 32),
    "spiking, tdbn": ("spiking_resnet18", {"width": 4, "stem_width": 4}, LIF, 32),
    "spiking bottleneck": ("spiking_resnet50", {"width": 2, "stem_width": 4}, IF, 32),
    "resnet19": ("spiking_resnet19", RESNET19, LIF, 16),
    "ms": ("ms_resnet34", {"width": 4}, LIF, 32),
    "ms, deep": (
        "ms_resnet18",
        {"width": 4, "stem": "deep", "pooled_projections": True, "drop_rate": 0.2},
        IF,
        32,
    ),
    "preact": ("preact_resnet18", {"width": 4}, LIF, 32),
    "i2e": ("i2e_msnet18", {"width": 4}, {"threshold": 0.5}, 32),
    "sew, as events": ("sew_resnet18", {"width": 4}, LIF, 32),
    "vggsnn": ("vggsnn", {"input_size": 16}, LIF, 16),
    "convnet": ("spiking_convnet", CONVNET, LIF, 12),
    "events": ("spiking_convnet_dvs", CONVNET, LIF, 12),
    "plif": ("spiking_convnet", CONVNET, {"kind": "plif", "threshold": 0.3}, 12),
    "plif, input as it is": (
        "spiking_convnet",
        CONVNET,
        {"kind": "plif", "decay_input": False},
        12,
    ),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def save(network, folder, **neuron):
    """A checkpoint of a small network with norms of no initialiser's choice."""
    name, arguments, own_neuron, side = NETWORKS[network]
    data = {"root": "/home/me/secret", "kind": "events"}
    if name not in ("vggsnn", "spiking_convnet_dvs"):
        data = {"root": "/home/me/secret", "image_size": side, "mean": [0.5, 0.5, 0.5]}
        if network in ("i2e", "sew, as events"):
            data["images_as_events"] = {"ratio": 0.07}
    raw = {
        "name": "small",
        "model": {
            "name": name,
            "num_classes": 5,
            "neuron": neuron if "kind" in neuron else own_neuron | neuron,
            "arguments": arguments,
        },
        "data": data,
        "batch": {"global": 8, "micro": 4},
        "phases": [{"epochs": 2, "timesteps": T, "optimizer": {"lr": 0.1}}],
        "loss": {"distillation": {"teacher": "/home/me/secret/big", "self_weight": 0.5}},
        "init_checkpoint": "/home/me/secret/relu.safetensors",
        "tracking": {"uri": "http://user:secret@tracker", "trackers": ["tensorboard"]},
        "profile": [1, 2],
        "runs_dir": "/home/me/runs",
        "cluster": {"account": "secret"},
    }
    config = parse(raw, "test")
    torch.manual_seed(0)
    model = config.model.build(num_classes=5, timesteps=T, input_kind=config.data.input_kind)
    randomize(model)
    with torch.no_grad():
        if network == "resnet19":
            model.hidden[0].weight.mul_(8)  # means over positions are weak currents
        for key, parameter in model.named_parameters():
            if ".learned." in key:
                parameter.add_(0.3 * torch.randn_like(parameter))
    description = checkpoint.Description(
        config=config.as_dict(),
        classes=list("abcde"),
        timesteps=T,
        step=7,
        validation={"top1": 61.25, "top5": 100.0},
    )
    file = folder / "model.safetensors"
    checkpoint.write_model_file(file, model.state_dict(), description)
    return file


def logits(trained, x):
    with torch.no_grad():
        result = trained.model(x)
    assert len(result.unique()) > 5  # it does say something
    return result


# --------------------------------------------------------------------------- files of weights


@pytest.mark.parametrize(
    ("network", "kind"),
    [
        ("events", "safetensors"),
        ("spiking, tdbn", "timm"),
        ("sew, as events", "timm"),
    ],
)
def test_code_of_the_card_loads_the_network(output_of, network, kind, tmp_path, monkeypatch):
    file = save(network, tmp_path)
    folder = tmp_path / "given"
    output_of("export", file, "--format", kind, "--output", folder)
    trained = load(file)
    x = trained.examples(2)
    card = (folder / "README.md").read_text()
    assert ("pipeline_tag" in card) == ("image-classification" in card) == ("events" not in network)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # As its reader does: beside the folder, or in it.
    monkeypatch.chdir(tmp_path if kind == "timm" else folder)
    names = {"x": x}
    with torch.no_grad():
        exec(code.replace("model(x)  #", "y = model(x)  #"), names)  # the card is ours
    torch.testing.assert_close(names["y"], logits(trained, x))
    assert names["model"].timesteps == 2  # the last line's
    expected = load_file(file)
    given = load_file(folder / "model.safetensors")
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in given)


def test_card_says_what_a_reader_asks_and_no_secrets(output_of, tmp_path):
    file = save("spiking, tdbn", tmp_path)
    output_of("export", file, "--format", "timm", "--output", tmp_path / "given")
    card = (tmp_path / "given" / "README.md").read_text()
    for part in (
        "| network | spiking_resnet18, width 4, stem_width 4 |",
        "| neuron | kind lif, threshold 0.5, decay 0.75, reset hard, detach_reset False, "
        "surrogate triangle, surrogate_width 1.0, spike step, fires_at_threshold False |",
        "| timesteps | 3 |",
        "| input | 3 x 32 x 32 image |",
        "| loss | TET, lambda 0.001, phi 1; 0.2 x divergence from big; 0.5 x divergence from the "
        "time-mean, temperature 2 |",
        "| initial weights | relu.safetensors |",
        "61.25 % top-1",
        "shorter side resized to 37 (bilinear), centre crop of 32, minus [0.5, 0.5, 0.5]",
        "  surrogate: triangle",
        "pip install -e '.[train,cuda130]'",
    ):
        assert part in card, part
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-classification"
    assert "license" not in front  # none was given
    recipe = yaml.safe_load((tmp_path / "given" / "recipe.yaml").read_text())
    assert not recipe.keys() & {"profile", "tracking", "cluster", "save", "runs_dir"}
    assert recipe["data"].keys() & {"root", "threads", "image_size"} == {"root", "image_size"}
    parse(recipe, "recipe.yaml")
    for path in (tmp_path / "given").iterdir():
        assert b"secret" not in path.read_bytes(), path
        assert b"/home/me" not in path.read_bytes(), path
    cfg = json.loads((tmp_path / "given" / "config.json").read_text())["pretrained_cfg"]
    assert cfg["label_names"] == list("abcde")
    assert (cfg["input_size"], cfg["crop_pct"]) == ([3, 32, 32], 32 / 37)
    assert (cfg["mean"], cfg["std"]) == ([0.5, 0.5, 0.5], [0.229, 0.224, 0.225])


def test_card_says_what_an_accuracy_flatters(tmp_path):
    _, description = checkpoint.load_model_file(save("convnet", tmp_path))
    held_out = tiny.changed(description.config, {"data.held_out": 0.1})
    for config, of in (
        (description.config, "the validation split"),
        (held_out, "samples held out of the training split"),
    ):
        for which, rest in (("last", ""), ("best", ", which were chosen on the same split")):
            described = description.model_copy(update={"config": config, "which": which})
            assert export._accuracy(described).endswith(f" of {of}, with these weights{rest}")


def test_accuracy_is_not_claimed_at_another_t_and_names_may_have_dots(output_of, tmp_path):
    file, folder = save("convnet", tmp_path), tmp_path / "net-1.5"
    command = [file, "--format", "safetensors", "--output", folder, "--timesteps", 6]
    output_of("export", *command)
    card = (folder / "README.md").read_text()
    assert "| timesteps | 6 |" in card
    assert "| accuracy | not measured with this file |" in card


def test_real_run_is_given_away_and_taken_back(output_of, tiny_root, tiny_config, main, tmp_path):
    tiny.expect(main(tiny_config({"evaluate_every": 1})))
    run, given = tmp_path / "runs" / "tiny", tmp_path / "given"
    output = output_of("export", run, "--format", "safetensors", "--output", given)
    top1 = tiny.metrics(run, "val")[-1]["top1"]
    card = (given / "README.md").read_text()
    assert f"{top1:.2f} % top-1" in card
    git = json.loads((run / "environment.json").read_text())["git"]
    assert git is None or f"| trained at commit | {git['commit'][:12]}" in card
    changes = {"name": "again", "init_checkpoint": str(given / "model.safetensors")}
    text = tiny.expect(main(tiny_config(changes), "max_steps=1"), "beginning with the weights of")
    assert "another network" not in text
    # The folder is what its weights are; the name of a file makes one, of the same weights.
    changes = {"name": "of-the-folder", "init_checkpoint": str(given)}
    tiny.expect(main(tiny_config(changes), "max_steps=1"))
    alone = tmp_path / "alone.safetensors"
    output = output_of("export", given, "--format", "safetensors", "--output", alone)
    assert f"wrote {alone}: the weights" in output
    assert alone.read_bytes() == (given / "model.safetensors").read_bytes()
    tables = []
    for source in (run, given):
        output = output_of("eval", "--checkpoint", source, "--data", tiny_root)
        tables.append(output.replace(str(source), ""))
    assert f"{top1:.2f}" in tables[0]
    assert tables[0] == tables[1]


class Outside(nn.Module):
    """A network from outside, with nothing but what is asked of one."""

    def __init__(self):
        super().__init__()
        self.timesteps, self.num_classes, self.input_kind = T, 5, "images"
        self.fc = nn.Linear(3 * 12 * 12, 5)

    def forward(self, x, per_timestep=False):
        assert per_timestep, "nothing else may be asked for"
        return torch.stack([t * self.fc(x.flatten(1)) for t in range(1, T + 1)])


def test_a_network_from_outside(tmp_path):
    ours = load(save("convnet", tmp_path))
    network = Outside().eval()
    trained = Trained(network, ours.config, ours.description)
    text = export.write_torch(trained, tmp_path / "it.pt2")
    assert "relative difference" in text
    assert "weak check" not in text
    nn.init.zeros_(network.fc.weight)
    text = export._agreement(trained, lambda x: network(x, per_timestep=True).mean(0))
    assert "a weak check, because the network's logits are the same for all inputs" in text
    export.write_safetensors(trained, tmp_path / "it")
    card = (tmp_path / "it" / "README.md").read_text()
    assert "model(x, per_timestep=True).mean(0)" in card
    assert f"import {__name__}  # registers the model" in card
    for refused in (
        lambda: export.write_timm(trained, tmp_path / "timm"),
        lambda: export.write_nir(trained, tmp_path / "it.nir", 1e-4),
    ):
        with pytest.raises(UserError, match=r"for tetdist's own networks, .* is from outside"):
            refused()


# ---------------------------------------------------------------------------------------- NIR


PAGE = (tiny.PROJECT / "docs" / "weights.md").read_text()
(PROGRAM,) = re.findall(r"```python\n# run_nir.py\n(.*?)```", PAGE, re.DOTALL)


def over_time(module, trained, x):
    """Logits of each timestep, (T, B, K)."""
    state, outputs = None, []
    for t in range(T):
        frame = x if trained.config.data.input_kind == "images" else x[:, t]
        output, state = module(frame, state)
        outputs.append(output)
    return torch.stack(outputs).detach()


@pytest.mark.parametrize(
    "network",
    [
        *("sew, and", "sew, iand", "spiking, tdbn", "spiking bottleneck", "resnet19", "ms, deep"),
        *("sew, as events", "convnet", "plif", "plif, input as it is"),
    ],
)
def test_nir_graph_run_by_nirtorch_is_the_network(network, tmp_path):
    trained = load(str(save(network, tmp_path)))
    dt = 1e-3
    output = export.write_nir(trained, tmp_path / "graph.nir", dt)
    assert "3 timesteps of 0.001 s" in output
    graph = nir.read(tmp_path / "graph.nir")
    assert graph.metadata["dt"] == dt
    scaled = "minus [0.5, 0.5, 0.5], divided by [0.229, 0.224, 0.225]"
    prepared = "frames(as_events(images, 0.07" if network == "sew, as events" else scaled
    assert prepared in graph.metadata["preparation"]
    assert json.loads(graph.metadata["classes"]) == trained.description.classes
    assert not any("norm" in name for name in graph.nodes)  # folded

    x = trained.examples(2).double()
    with torch.no_grad():
        expected = trained.model.double()(x, per_timestep=True)
    assert len(expected.flatten(1).unique(dim=0)) > 1 or "and" in network
    exec(PROGRAM, page := {})
    actual = over_time(page["load"](tmp_path / "graph.nir", torch.float64), trained, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", ["convnet", pytest.param("vggsnn", marks=pytest.mark.long)])
def test_spikingjelly_imports_the_nir_graph(network, tmp_path):
    trained = load(save(network, tmp_path))
    export.write_nir(trained, tmp_path / "graph.nir", 1e-4)
    module = nir_exchange.import_from_nir(tmp_path / "graph.nir", dtype=torch.float64)
    x = trained.examples(2).double()
    with torch.no_grad():
        expected = trained.model.double()(x, per_timestep=True)
        actual = over_time(module, trained, x)
    assert len(expected.flatten(1).unique(dim=0)) > 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_nir_neuron_that_fires_at_the_threshold(tmp_path):
    file = save("convnet", tmp_path, threshold=0.7, fires_at_threshold=True)
    node = to_nir(load(file).model, (3, 12, 12)).nodes["stem_neuron"]
    at = np.float32(0.7)
    assert (at > node.v_threshold).all()
    assert not (np.nextafter(at, np.float32(0)) > node.v_threshold).any()


@pytest.mark.parametrize(
    ("network", "neuron", "words"),
    [
        ("convnet", {"reset": "soft"}, "reset is soft"),
        ("convnet", {"spike": "sigmoid", "surrogate": "sigmoid"}, "spike is sigmoid"),
        (
            "convnet",
            {"kind": "psn", "timesteps": T},
            "has neurons of the kind PSN, for which NIR has no node",
        ),
        ("i2e", {}, "i2e_msnet18 takes maxima of real numbers in its stem"),
    ],
)
def test_what_nir_cannot_express_is_refused(output_of, tmp_path, network, neuron, words):
    file = save(network, tmp_path, **neuron)
    output = output_of(
        "export", file, "--format", "nir", "--output", tmp_path / "graph.nir", status=2
    )
    assert words in output
    assert list(tmp_path.iterdir()) == [file]


# ---------------------------------------------------------------------------------- programs


PROGRAMS = ("torch", "onnx", "onnx-step")


def by_the_loop_of_the_page(path, x, timesteps):
    """Run a graph of a timestep by the code that docs/weights.md shows."""
    (code,) = re.findall(r"```python\n(import numpy.*?)```", PAGE, re.DOTALL)
    exec(code, found := {})
    frames = list(x.unbind(1)) if x.ndim == 5 else [x] * timesteps
    return torch.from_numpy(found["run"](path, [frame.numpy() for frame in frames]))


def export_program(output_of, file, form, *options):
    """Export a network, and return the path of the program."""
    path = file.with_name(f"{form}.{'pt2' if form == 'torch' else 'onnx'}")
    output = output_of("export", file, "--format", form, "--output", path, *options)
    assert "its logits match the model's" in output
    return path


def run_program(form, path, x):
    """The logits of an exported program, and what it says of the preparation of its inputs."""
    if form == "torch":
        extra = {"preparation": ""}
        program = torch.export.load(path, extra_files=extra).module()
        assert "channels_last" not in program.code
        return program(x), extra["preparation"]
    session = onnxruntime.InferenceSession(path)
    preparation = session.get_modelmeta().custom_metadata_map["preparation"]
    if form == "onnx-step":
        return by_the_loop_of_the_page(path, x, T), preparation
    (given,) = session.get_inputs()
    (found,) = session.run(["logits"], {given.name: x.numpy()})
    return torch.from_numpy(found), preparation


@pytest.mark.parametrize(
    ("network", "neuron", "forms"),
    [
        ("events", {}, ("torch", "onnx")),
        ("convnet", {"kind": "sliding_psn", "order": 3}, ("onnx-step",)),
        *(
            pytest.param(network, neuron, forms, marks=pytest.mark.long)
            for network, neuron, forms in (
                ("convnet", {"kind": "psn", "timesteps": T}, ("torch", "onnx")),
                *((name, {}, PROGRAMS) for name in ("events", "i2e", "sew, add", "preact")),
                *(
                    ("convnet", {"kind": kind}, PROGRAMS)
                    for kind in ("plif", "ilif", "nilif", "sliding_psn")
                ),
            )
        ),
    ],
)
def test_programs_are_the_network(network, neuron, forms, output_of, tmp_path):
    """With another batch size than they were traced with."""
    neuron = neuron | {"threshold": 0.3} if neuron else neuron
    file = save(network, tmp_path, **neuron)
    trained = load(file)
    x = trained.examples(5)
    expected = logits(trained, x)
    prepared = "minus [0.5, 0.5, 0.5], divided by [0.229, 0.224, 0.225]"
    prepared = {
        "events": "event frames, (B, T, 2, H, W)",
        "i2e": "`frames(as_events(images, 0.07, None)).float()` of tetdist",
    }.get(network, prepared)
    for form in forms:
        with torch.no_grad():
            actual, preparation = run_program(form, export_program(output_of, file, form), x)
        if form == "onnx-step":
            prepared = prepared.replace("B, T, 2", "B, 2")
        assert prepared in preparation
        # Kernels round differently, so on some processor one sample may have a flipped spike.
        assert torch.isclose(actual, expected, rtol=1e-4, atol=1e-5).all(1).sum() >= len(x) - 1


def test_onnx_graph_of_a_timestep_is_refused_by_name(output_of, tmp_path):
    file = save("convnet", tmp_path, kind="psn", timesteps=T)
    path = tmp_path / "step.onnx"
    output = output_of("export", file, "--format", "onnx-step", "--output", path, status=2)
    assert "has psn neurons" in output
    assert not path.exists()
    model = timm.create_model("psn_sew_resnet18", neuron={"kind": "sliding_psn"})
    with pytest.raises(UserError, match=r"needs equal timesteps, but PSNSEWResNet adds another"):
        export.save_step(model, torch.zeros(2, 3, 32, 32), path, {})


# ------------------------------------------------------------------------------------ mistakes


def test_missing_package_is_named(output_of, tmp_path, monkeypatch):
    file = save("convnet", tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    output = output_of(
        "export", file, "--format", "onnx", "--output", tmp_path / "net.onnx", status=2
    )
    assert f"onnxruntime is not installed; {pip_install('train,export')}\n" in output


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "onnx", "--output", "net.nir"], "must end in .onnx"),
        (["--format", "onnx", "--output", "n.onnx", "--dt", "1"], "applies to --format nir only"),
        (["--format", "nir", "--output", "n.nir", "--dt", "0"], "--dt 0 must be finite and above"),
        (["--format", "timm", "--output", "n", "--timesteps", "0"], "--timesteps: 0 must be"),
        (["--push", "small"], "--push small: a repository's name must be ORG/NAME"),
        (["--push", "a/b", "--format", "onnx"], "leave out --format onnx"),
        (["--format", "timm", "--output", "n", "--public"], "--public applies to --push only"),
        (["--format", "timm"], "give --format and --output, or --push ORG/NAME"),
    ],
)
def test_arguments_are_checked(output_of, arguments, complaint):
    output = output_of("export", "nowhere", *arguments, status=2)
    assert complaint in output


@pytest.mark.parametrize("kind", ["safetensors", "nir"])
def test_what_exists_is_not_replaced(output_of, tmp_path, kind):
    file = save("convnet", tmp_path)
    output = tmp_path / f"mine.{kind}"
    output.write_text("precious")
    printed = output_of("export", file, "--format", kind, "--output", output, status=2)
    assert f"{output.name} exists" in printed
    assert output.read_text() == "precious"
    (tmp_path / checkpoint.MANIFEST_FILE).write_text("{}")
    printed = output_of(
        "export", file, "--format", kind, "--output", tmp_path / f"new.{kind}", status=2
    )
    assert "is a checkpoint; choose another folder" in printed
    missing = tmp_path / "mistyped" / f"new.{kind}"
    printed = output_of("export", file, "--format", kind, "--output", missing, status=2)
    assert f"there is no folder {missing.parent}; correct it, or make it" in printed
    assert not missing.parent.exists()
