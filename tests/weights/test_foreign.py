"""Weights from elsewhere: the network that they make is the one that they came from."""

import argparse
import json
import re
from pathlib import Path

import pytest
import timm
import tiny
import torch
import torchvision
from published import Published, sew_layout
from safetensors.torch import load_file, save_file
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet
from torch import nn

from tetdist.apps.weights import foreign
from tetdist.apps.weights.sources import SOURCES
from tetdist.errors import UserError
from tetdist.nn.batch_norm import BatchNorm
from tetdist.storage import checkpoint, foreign_files

T = 3


pytestmark = pytest.mark.usefixtures("one_thread")


def relative(a, b):
    return ((a.detach() - b.detach()).norm() / b.detach().norm()).item()


def randomized(model):
    """In float64, with norms of no initialiser's choice."""
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            values = torch.rand((4, module.num_features), generator=generator, dtype=torch.float64)
            module.weight.data = 0.6 + values[0]
            module.bias.data = 0.1 + 0.4 * values[1]
            module.running_mean = 0.6 * values[2] - 0.3
            module.running_var = 0.5 + values[3]
    return model


def ours(name, **options):
    torch.manual_seed(2)
    model = timm.create_model(name, timesteps=T, **options).double()
    model.set_execution("reference")
    return model


def converted(state, source, model):
    result = foreign.convert(state, source, model)
    assert (result.missing, result.unexpected) == ([], [])
    model.load_state_dict(result.weights)
    return model


# ---------------------------------------------------------------------------------- spikingjelly


def from_spikingjelly(name, decay_input=None, make=neuron.IFNode, **options):
    torch.manual_seed(0)
    module = sew_resnet if name.startswith("sew") else spiking_resnet
    extra = {}
    if decay_input is not None:
        make, extra = neuron.LIFNode, {"tau": 2.0, "decay_input": decay_input}
    model = getattr(module, name)(
        num_classes=5,
        spiking_neuron=make,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        **options,
        **extra,
    )
    functional.set_step_mode(model, "m")
    return randomized(model)


@pytest.mark.parametrize(
    ("name", "theirs_options", "own_neuron", "ours_options"),
    [
        ("sew_resnet18", {"cnf": "IAND"}, {}, {"connect_function": "iand"}),
        pytest.param("sew_resnet50", {"cnf": "ADD"}, {}, {}, marks=pytest.mark.long),
        # docs/extending.md: decay_input
        (
            "spiking_resnet18",
            {"decay_input": True},
            {"decay": 0.5, "threshold": 2.0, "surrogate_width": 1.0},
            {"norm": "bn"},
        ),
        pytest.param("spiking_resnet50", {}, {}, {"norm": "tdbn"}, marks=pytest.mark.long),
    ],
)
def test_agrees_with_spikingjelly(name, theirs_options, own_neuron, ours_options):
    theirs = from_spikingjelly(name, **theirs_options)
    neuron = SOURCES["spikingjelly"].neuron | own_neuron
    model = ours(name, num_classes=5, neuron=neuron, **ours_options)
    converted(theirs.state_dict(), "spikingjelly", model)
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)
    for training in (False, True):
        theirs.train(training).zero_grad()
        functional.reset_net(theirs)
        model.train(training).zero_grad()
        expected = theirs(x.expand(T, *x.shape))
        logits = model(x, per_timestep=True)
        assert len(logits.detach().flatten(1).unique(dim=0)) > 1  # time makes a difference
        assert relative(logits, expected) < 1e-8

        weighting = torch.randn(logits.shape, dtype=torch.float64, generator=generator)
        (logits * weighting).sum().backward()
        (expected * weighting).sum().backward()
        assert_same_gradients(model, theirs)

    moved = foreign.convert(theirs.state_dict(), "spikingjelly", model).weights
    for key, value in model.state_dict().items():
        if "running" in key:
            assert relative(value, moved[key]) < 1e-8, key


def assert_same_gradients(model, theirs):
    # The gradient of a batch norm's weight w' = w / scale is scale times that of w, and
    # conversion divides by the scale once.
    scales = {
        f"{name}.weight": module.scale**2
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
    }
    gradients = {key: p.grad for key, p in theirs.named_parameters()}
    expected = foreign.convert(gradients, "spikingjelly", model).weights
    silent = []
    for key, parameter in model.named_parameters():
        there = expected[key] * scales.get(key, 1.0)
        assert (parameter.grad - there).norm() <= 1e-8 * there.norm(), key
        silent += [] if there.any() else [key]
    # In evaluation neurons that halve their input send nothing to three layers.
    assert len(silent) <= 3, silent


@pytest.mark.parametrize(
    ("kind", "make", "numbers"),
    [
        ("plif", neuron.ParametricLIFNode, {}),
        ("psn", lambda: neuron.PSN(T), {"timesteps": T}),
        (
            "masked_psn",
            lambda: neuron.MaskedPSN(2, T, lambda_init=1.0, step_mode="m"),
            {"timesteps": T},
        ),
        ("sliding_psn", lambda: neuron.SlidingPSN(2), {}),
    ],
)
def test_what_spikingjellys_neurons_learn_comes_with_the_weights(kind, make, numbers):
    """docs/weights.md: a neuron of the same kind, with its own numbers."""
    theirs = from_spikingjelly("spiking_resnet18", make=lambda **_: make()).eval()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if re.search(r"(^|\.)(sn\d|downsample_sn)\.", key):
                parameter.add_(0.2 * torch.randn_like(parameter))
    own_neuron = {"kind": kind, **numbers}
    model = ours("spiking_resnet18", num_classes=5, neuron=own_neuron, norm="bn").eval()
    converted(theirs.state_dict(), "spikingjelly", model)
    x = 3 * torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = theirs(x.expand(T, *x.shape)), model(x, per_timestep=True)
    assert logits.std() > 0
    assert relative(logits, expected) < 1e-8


def test_relu_network_is_that_of_torchvision():
    """So that a teacher may be one of theirs, and its accuracy may be checked here."""
    theirs = randomized(torchvision.models.resnet18(num_classes=5))
    model = ours("spiking_resnet18", num_classes=5, norm="bn", neuron={"kind": "relu"})
    converted(theirs.state_dict(), "torchvision", model)
    model.set_timesteps(1)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for training in (False, True):
        theirs.train(training)
        model.train(training)
        assert relative(model(x), theirs(x)) < 1e-12


# ------------------------------------------------------------------- the original repositories


def test_checkpoints_of_the_sew_repository(tmp_path):
    name, file = "sew_resnet18", tmp_path / "checkpoint_319.pth"
    state = from_spikingjelly(name, cnf="ADD").state_dict()
    torch.save(
        {
            "model": sew_layout(state, sew=True),
            "optimizer": {"state": {}, "param_groups": []},
            "epoch": 319,
            "args": argparse.Namespace(model=name, T=4),
        },
        file,
    )
    read = foreign_files.read(file)
    assert foreign.source_of(read, file) == "sew"
    assert foreign.num_classes(read, "sew") == 5
    result = foreign.convert(read, "sew", ours(name, num_classes=5))
    expected = foreign.convert(state, "spikingjelly", ours(name, num_classes=5)).weights
    assert (result.missing, result.unexpected) == ([], [])
    assert [key for key in expected if not torch.equal(result.weights[key], expected[key])] == []


# TET and distillation have one ResNet-19, with the same neurons in evaluation.
RESNET19 = Published("resnet19")
OF_RESNET19 = RESNET19.arguments | {"num_classes": 4}


def tet_layout(state):
    """A ResNet-19 under TET's names, where a layer is registered by itself and in containers."""
    found = {}
    for name, value in state.items():
        for pattern, theirs in (
            (r"^conv0\.0\.", "conv1."),
            (r"^conv0\.1\.", "bn1."),
            (r"shortcut\.0\.", "downsample.layer.module."),
            (r"shortcut\.1\.", "downsample.bn."),
            (r"^classifier\.0\.", "fc1."),
            (r"^classifier\.2\.", "fc2."),
        ):
            name = re.sub(pattern, theirs, name)
        place, _, leaf = name.rpartition(".")
        if re.search(r"(conv|fc)\d$", place):
            found |= {name: value, f"{place}_s.layer.module.{leaf}": value}
        elif re.search(r"bn\d?$", place):
            wrapped = re.sub(r"bn(\d)$", r"conv\1_s.bn", place)
            for one in (place, wrapped):
                found |= {f"{one}.bn.{leaf}": value, f"{one}.seqbn.module.{leaf}": value}
        else:
            found[name] = value
    return found


def test_agrees_with_the_resnet19_of_tet_and_of_distillation(tmp_path):
    """Under best_net; neither's names tell which of the two repositories it is from."""
    state, file = RESNET19.state(), tmp_path / "model_weights.pth"
    torch.save({"best_acc": 95.0, "best_epoch": 7, "best_net": state, "optimizer": {}}, file)
    read = foreign_files.read(file)
    assert read.keys() == state.keys()
    with pytest.raises(UserError, match=r"name its source with --from: decoupling, seal"):
        foreign.source_of(read, file)
    of_tet = converted(tet_layout(state), "tet", ours("spiking_resnet19", **OF_RESNET19))
    with torch.no_grad():
        logits = of_tet.eval()(RESNET19.batch(), per_timestep=True)
    assert relative(logits, torch.tensor(RESNET19.logits["eval"], dtype=torch.float64)) < 1e-12


def test_prefix_of_a_parallel_wrapper_is_removed(tmp_path):
    state = tet_layout(RESNET19.state())
    compiled = "_orig_mod."  # before or after the other
    for prefix in ("module.", compiled, f"module.{compiled}", f"{compiled}module."):
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, tmp_path / "a.pth")
        read = foreign_files.read(tmp_path / "a.pth")
        assert read.keys() == state.keys()
    assert foreign.source_of(read, tmp_path / "a.pth") == "tet"


ONE = {"fc.weight": torch.zeros(1)}
CONTRADICTING = {"conv1.weight": torch.ones(1), "conv1_s.layer.module.weight": torch.zeros(1)}
STRIDED = {f"features.{i}.fwd.module.0.weight": torch.zeros(1) for i in range(8)}


@pytest.mark.parametrize(
    ("state", "source", "model", "complaint"),
    [
        (CONTRADICTING, "tet", "spiking_resnet19", r"conv1\.weight and conv1_s\.layer\.module"),
        (STRIDED, "tet", "vggsnn", "VGGSNNwoAP"),
        (ONE, "spikingjelly", "sew_resnet50", "have the opposite IAND"),
        (ONE, "sew", "sew_resnet18", "torchvision's names, not those of the SEW-ResNet"),
        ({}, "timm", "spiking_convnet", "spiking_convnet has no counterpart"),
        (ONE, "torchvision", "preact_resnet18", "do not belong to preact_resnet18"),
        (ONE, "decoupling", "sew_resnet18", "weights of decoupling do not belong to sew_resnet18"),
    ],
)
def test_weights_of_another_network_are_refused(state, source, model, complaint):
    options = {"connect_function": "iand"} if model == "sew_resnet50" else {}
    with pytest.raises(UserError, match=complaint):
        foreign.convert(state, source, ours(model, num_classes=5, **options))


# ------------------------------------------------------------------------------------- refusals


class Code:
    """Executes a command when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_code_in_a_file_is_refused_and_not_executed(tmp_path):
    torch.save({"state_dict": {}, "extra": Code(tmp_path / "executed")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"holds more than weights .* is not read"):
        foreign_files.read(tmp_path / "a.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.pth", b"\x80\x05 this is neither", "not (a readable weight file|read)"),
        ("a.pth", b"text", "neither torch's nor safetensors' format"),
        ("a.pth", None, "there is no file"),
        *(
            ("a.pth", content, "holds no state dict")
            for content in ([1, 2], {"epoch": 3}, {}, {0: torch.zeros(1)})
        ),
        ("a.pth", {"b": torch.tensor([1.0, torch.nan])}, r"infinity \(in b\), since its training"),
        ("a.pth", {"a": torch.ones(1).expand(10**9, 10**9)}, r"expanded or meta tensor \(a\)"),
        ("a.pth", {"a": torch.ones(2).to_sparse()}, r"sparse, complex, .* tensor \(a\)"),
    ],
)
def test_files_without_weights_are_named(name, content, complaint, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / name)
    with pytest.raises(UserError, match=complaint):
        foreign_files.read(tmp_path / name)


def test_programs_are_refused(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), tmp_path / "b.pt")
    with pytest.raises(UserError, match="is a TorchScript program, which is code"):
        foreign_files.read(tmp_path / "b.pt")


def test_names_that_several_sources_share_need_a_source():
    state = torchvision.models.resnet18(weights=None).state_dict()
    with pytest.raises(UserError, match="--from"):
        foreign.source_of(state, Path("a.pth"))
    with pytest.raises(UserError, match=r"has unknown names .*'encoder"):
        foreign.source_of({"encoder.weight": torch.zeros(1)}, Path("a.pth"))


# ------------------------------------------------------------------------------------- the tool

SMALL_RESNET18 = ["model.arguments.width=4", "data.image_size=16", "data.resize=16"]


@pytest.fixture(scope="module")
def relu_file(tmp_path_factory):
    """A narrow ResNet-18 of timm, of 4 classes."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", channels=(4, 8, 16, 32), num_classes=4)
    file = tmp_path_factory.mktemp("relu") / "resnet18.safetensors"
    save_file(model.state_dict(), file)
    return file


def test_training_and_evaluation_begin_with_a_relu_network(
    output_of, relu_file, tiny_root, tmp_path, tiny_config, main
):
    output = tmp_path / "converted.safetensors"
    command = [relu_file, "--model", "spiking_resnet18", "--from", "timm", "--output", output]
    printed = output_of("convert", *command, "--classes", tiny_root / "val", *SMALL_RESNET18)
    assert "107 of 107 tensors converted, as weights of timm" in printed

    arguments = ["--checkpoint", output, "--data", tiny_root, "--device", "cpu", "--json"]
    printed = output_of("eval", *arguments, tmp_path / "before.json")
    before = json.loads((tmp_path / "before.json").read_text())
    assert before["samples"] == sum(tiny.VAL_SIZES)
    assert before["model"] == "spiking_resnet18"
    assert before["timesteps"] == 4

    changes = {
        "model": {"name": "spiking_resnet18", "arguments": {"width": 4}},
        "init_checkpoint": str(output),
        "phases.0.optimizer.lr": 1e-9,
    }
    begun = f"beginning with the weights of {output}"
    assert "other classes" not in tiny.expect(main(tiny_config(changes), "max_steps=1"), begun)
    trained = load_file(tiny.newest(tmp_path / "runs" / "tiny") / "model.safetensors")
    theirs = load_file(relu_file)
    for own, key in (
        ("stem.conv.weight", "conv1.weight"),
        ("blocks.7.merge.conv.weight", "layer4.1.conv2.weight"),
        ("fc.weight", "fc.weight"),
    ):
        torch.testing.assert_close(trained[own], theirs[key], atol=1e-6, rtol=0)


def test_another_number_of_classes_is_named_and_may_be_allowed(
    output_of, relu_file, tiny_root, tmp_path
):
    output = tmp_path / "converted.safetensors"
    command = [relu_file, "--model", "spiking_resnet18", "--from", "timm", "--output", output]
    command += [*SMALL_RESNET18, "model.num_classes=7"]
    printed = output_of("convert", *command, status=2)
    assert "fc.weight (fc.weight in the file) has shape (4, 32) instead of (7, 32)" in printed
    assert "2 tensors missing or of another shape and 0 unknown" in printed
    assert not output.exists()
    printed = output_of("convert", *command, "--allow-missing")
    assert "missing: fc.bias" in printed
    weights, description = checkpoint.load_model_file(output)
    assert weights["fc.weight"].shape == (7, 32)
    assert torch.equal(weights["stem.conv.weight"], load_file(relu_file)["conv1.weight"])
    assert description.classes is None
    assert description.converted == {"file": "resnet18.safetensors", "from": "timm"}

    printed = output_of(
        "eval", "--checkpoint", output, "--data", tiny_root, "--device", "cpu", status=2
    )
    assert f"the data has 4 classes, but {output} has 7" in printed


def test_tetdists_own_weights_are_converted_to_other_classes(
    output_of, relu_file, tiny_root, tmp_path
):
    """As they are, though batch norm's scale divides those of other libraries."""
    first, same, three = (tmp_path / f"{name}.safetensors" for name in ("first", "same", "three"))
    command = [relu_file, "--from", "timm", "--output", first, "--classes", tiny_root / "val"]
    output_of("convert", *command, "--model", "spiking_resnet18", "--timesteps=3", *SMALL_RESNET18)
    own, before = checkpoint.load_model_file(first)
    command = [first, "--model", "spiking_resnet18", "--output"]
    printed = output_of("convert", *command, same)
    assert "107 of 107 tensors converted, as weights of tetdist" in printed
    assert "assumed" not in printed
    weights, description = checkpoint.load_model_file(same)
    assert all(torch.equal(weights[key], own[key]) for key in own | weights)
    assert (description.classes, description.timesteps) == (before.classes, 3)
    assert description.config == before.config | {"name": "same"}

    printed = output_of("convert", *command, three, "model.num_classes=3", status=2)
    assert "fc.weight (fc.weight in the file) has shape (4, 32) instead of (3, 32)" in printed
    output_of("convert", *command, three, "model.num_classes=3", "--allow-missing")
    weights, description = checkpoint.load_model_file(three)
    changed = {key for key in own if not torch.equal(weights[key], own[key])}
    assert changed == {"fc.weight", "fc.bias"}
    assert weights["fc.weight"].shape[0] == description.config["model"]["num_classes"] == 3
    assert description.classes is None


def test_tets_checkpoint_is_recognized_and_sees_images_as_its_loader_scales_them(
    output_of, tmp_path
):
    state = RESNET19.state()
    for key in ("classifier.2.weight", "classifier.2.bias"):
        state[key] = state[key].repeat_interleave(25, 0)  # as many classes as CIFAR-100
    torch.save(tet_layout(state), tmp_path / "tet.pth")
    output = tmp_path / "o.safetensors"
    command = [tmp_path / "tet.pth", "--model", "spiking_resnet19", "--timesteps", 6]
    small = [f"model.arguments.{k}={v}" for k, v in RESNET19.arguments.items()]
    printed = output_of("convert", *command, "--output", output, *small)
    assert "as weights of tet" in printed
    _, description = checkpoint.load_model_file(output)
    assert description.timesteps == 6
    model, data = description.config["model"], description.config["data"]
    assert (model["num_classes"], model["neuron"]["decay"]) == (100, 0.5)
    scales = ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])
    assert (data["image_size"], data["mean"], data["std"]) == (32, *scales)


@pytest.mark.parametrize(
    ("name", "neuron"),
    [
        (
            "preact_decoupling",
            {"decay": 0.2, "threshold": 1.0, "reset": "soft", "surrogate_width": 4.0},
        ),
        (
            "preact_seal",
            {"decay": 0.2, "threshold": 1.0, "reset": "hard", "surrogate": "sigmoid"},
        ),
        ("resnet19", {"decay": 0.5, "reset": "hard"}),
        ("resnet18_cifar", {"decay": 0.5, "reset": "hard"}),
        # Known by its names, behind the prefix of a parallel wrapper.
        (
            "ms_resnet",
            {"decay": 0.25, "threshold": 0.5, "surrogate": "rectangle", "detach_reset": True},
        ),
    ],
)
def test_converted_file_notes_its_sources_network(name, neuron, output_of, tmp_path):
    case, prefix = Published(name), "module." if name == "ms_resnet" else ""
    state = {f"{prefix}{key}": value for key, value in case.state().items()}
    torch.save({"best_acc": 1.0, "best_net": state}, tmp_path / "theirs.pth")
    output = tmp_path / "o.safetensors"
    # The stem of a ResNet-19, 128 channels wide, is noted unasked.
    given = [f"model.arguments.{k}={v}" for k, v in case.arguments.items() if v != 128]
    command = [tmp_path / "theirs.pth", "--model", case.model, "--output", output]
    command += [] if prefix else ["--from", case.source]
    printed = output_of("convert", *command, *given, "data.image_size=32", "data.resize=32")
    assert f"as weights of {case.source}" in printed
    _, description = checkpoint.load_model_file(output)
    noted = description.config["model"]
    assert noted["arguments"] == case.arguments
    assert {key: noted["neuron"][key] for key in neuron} == neuron


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "resnet18"], "'resnet18' is not a spiking model"),
        (["--model", "spiking_resnet18", "model.neuron.tau=2"], "tau=2: unknown key; set"),
        (["--model", "spiking_resnet18", "model.arguments.width=-1"], "cannot be built with"),
        (["--model", "spiking_resnet18", "--classes", "nowhere"], "--classes: nowhere cannot"),
        (["--model", "spiking_resnet18", "--timesteps", "0"], "--timesteps: 0 must be 1 or more"),
        (["--model", "vggsnn", "model.num_classes=7", "--allow-missing"], "no tensor in .* fits"),
    ],
)
def test_mistakes_end_in_a_sentence(output_of, relu_file, tmp_path, arguments, complaint):
    output = tmp_path / "o.safetensors"
    printed = output_of(
        "convert", relu_file, "--from", "timm", "--output", output, *arguments, status=2
    )
    assert re.search(complaint, printed), printed
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_that_should_stay(output_of, relu_file):
    command = [relu_file, "--model", "spiking_resnet18", "--from", "timm", "--output"]
    before = relu_file.read_bytes()
    output = output_of("convert", *command, relu_file, *SMALL_RESNET18, status=2)
    assert relu_file.read_bytes() == before
    assert f"{relu_file} exists; choose another --output" in output


def test_network_of_another_layout_lists_what_does_not_fit(output_of, tmp_path):
    """A CIFAR ResNet-20, with the names and shapes that a widely used repository gives it."""
    file = tmp_path / "resnet20.th"
    state = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [3, 3, 3, 1], num_classes=10
    ).state_dict()
    kept = {k: v for k, v in state.items() if not k.startswith(("layer4", "fc"))}
    kept |= {"linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}
    kept["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    wrapped = {f"module.{key}": value for key, value in kept.items()}
    torch.save({"state_dict": wrapped, "best_prec1": 91.78}, file)
    output = tmp_path / "o.safetensors"
    command = [file, "--model", "sew_resnet18", "--from", "torchvision", "--output", output]
    printed = output_of("convert", *command, status=2)
    assert len(printed.splitlines()) < 30
    assert "missing: stem.conv.weight (conv1.weight in the file) has shape (16, 3, 3, 3)" in printed
    assert re.search(r"  missing: \d\d more\n", printed)
    assert f"{file} is not a sew_resnet18 of torchvision" in printed
    assert not output.exists()
