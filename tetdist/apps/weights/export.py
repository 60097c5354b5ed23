"""Export of a trained network for other people and programs, for the command export.

Every file is written under a temporary name, checked, and renamed; existing files are never
replaced. Paths and addresses of the training machine are removed.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from huggingface_hub import ModelCardData
from safetensors.torch import save as serialize
from torch import Tensor, nn

import tetdist
from tetdist import models
from tetdist.apps.weights.integer_network import IntegerNetwork
from tetdist.apps.weights.integers import convert
from tetdist.apps.weights.trained import Trained
from tetdist.config.identity import without_machine
from tetdist.datasets.layouts import CLASSES_FILE
from tetdist.errors import UserError, typed
from tetdist.models import SpikingNetwork
from tetdist.models.streaming import carrying_layers, run_step
from tetdist.nn import neurons
from tetdist.storage import checkpoint
from tetdist.storage.bundled import TETDIST
from tetdist.storage.files import explaining, made_aside
from tetdist.storage.hub import HF
from tetdist.tables import markdown
from tetdist.wording import counted

_INPUTS = {"images": "image", "events": "event frame per timestep"}
# Number of inputs on which an exported program is compared, and its tolerance.
_CHECKED, _TOLERANCE = 4, 1e-4
# Configuration for the command train, beside the weights in a folder for timm.
RECIPE_FILE = "recipe.yaml"
INTEGERS_FILE = "integers.json"  # beside integers
_TIMMS_HUB = "hf-hub:"  # timm's prefix of the hub; tetdist's is `HF`


# --- files of weights -----------------------------------------------------------------------------


def write_safetensors(trained: Trained, path: Path) -> str:
    """Write the weights for eval and init_checkpoint, and a model card.

    Args:
        path: A folder, for model.safetensors and the card; or a file ending in .safetensors, for
            the weights alone.

    Returns:
        A description of the result, as all writers do.
    """
    with _aside(path) as aside:
        if path.suffix == ".safetensors":
            checkpoint.write_model_file(aside, trained.model.state_dict(), trained.description)
            return "the weights and their description; for a model card, give a folder as --output"
        aside.mkdir(parents=True)
        _write_weights(trained, aside)
        (aside / "README.md").write_text(card(trained))
    return "model.safetensors and its card, README.md"


def write_timm(trained: Trained, folder: Path, repo: str | None = None) -> str:
    """Write a folder that timm loads as a local model, or as a model of the Hugging Face hub.

    Args:
        repo: Its future ``ORG/NAME`` on the hub, which its card uses to load it.
    """
    refuse_foreign(trained, "timm")
    with _aside(folder) as aside:
        aside.mkdir(parents=True)
        _write_weights(trained, aside)
        (aside / "config.json").write_text(json.dumps(timm_config(trained), indent=1) + "\n")
        source = f"{_TIMMS_HUB}{repo}" if repo else f"local-dir:{folder.name}"
        (aside / "README.md").write_text(card(trained, source))
        (aside / RECIPE_FILE).write_text(_recipe(trained))
        if trained.description.classes:
            names = "".join(f"{name}\n" for name in trained.description.classes)
            (aside / CLASSES_FILE).write_text(names)
        with torch.no_grad():
            x = trained.examples(1)
            again = timm.create_model(f"local-dir:{aside}", pretrained=True).eval()
            again.set_execution("reference")
            assert torch.equal(again(x), trained.model(x)), "timm loads another network"
    return (
        "config.json, model.safetensors, card, recipe and classes; checked: timm loads it with "
        "identical logits"
    )


def _write_weights(trained: Trained, folder: Path) -> None:
    file, weights = folder / checkpoint.MODEL_FILE, trained.model.state_dict()
    checkpoint.write_model_file(file, weights, trained.description)


def timm_config(trained: Trained) -> dict[str, Any]:
    """Return timm's config.json: architecture, its arguments, and the preparation of images."""
    model, data = trained.model, trained.config.data
    cfg = {
        "input_size": trained.input_shape,
        "num_classes": model.num_classes,
        "crop_pct": data.image_size / data.resize_side,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
    }
    if data.input_kind == "events":
        cfg |= {"crop_pct": 1.0, "mean": (0.0, 0.0), "std": (1.0, 1.0)}
    cfg |= {key: model.default_cfg[key] for key in ("first_conv", "classifier")}
    if trained.description.classes:
        cfg["label_names"] = trained.description.classes
    return {
        "architecture": trained.config.model.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": _model_arguments(trained),
        "pretrained_cfg": cfg,
    }


def _model_arguments(trained: Trained) -> dict[str, Any]:
    """Return the arguments of the model, except its number of classes."""
    section = trained.config.model
    arguments = {"timesteps": trained.model.timesteps, "neuron": neurons.as_dict(section.neuron)}
    if trained.model.input_kind != models.input_kind(section.name):
        arguments["input_kind"] = trained.model.input_kind
    return arguments | section.arguments


def refuse_foreign(trained: Trained, form: str) -> None:
    """Refuse an adopted network for a format that needs one of tetdist's own."""
    if not hasattr(trained.model, "stem"):
        raise UserError(
            f"--format {form} is for tetdist's own networks, and {trained.config.model.name} "
            f"({type(trained.model).__name__}) is from outside; export it to safetensors"
        )


def _recipe(trained: Trained) -> str:
    """Return the training's configuration as YAML for the command train."""
    return yaml.safe_dump(without_machine(trained.description.config), sort_keys=False)


def card(trained: Trained, source: str | None = None) -> str:
    """Return a model card in Markdown.

    Args:
        source: Name for timm to load it: ``local-dir:NAME``, ``hf-hub:ORG/NAME``, or
            ``NETWORK.NAME`` if it comes with the package; None: it cannot.
    """
    model, config, description = trained.model, trained.config, trained.description
    neuron, data = config.model.neuron, config.data
    shape = " x ".join(map(str, trained.input_shape))
    rows = {
        "network": ", ".join([config.model.name, *_listed(config.model.arguments)]),
        "neuron": ", ".join(_listed(neurons.as_dict(neuron))),
        "timesteps": f"{model.timesteps}",
        "input": f"{shape} {_INPUTS[data.input_kind]}",
        "classes": f"{model.num_classes}",
    }
    if converted := description.converted:
        origin = f"`{converted['file']}` ({converted['from']})"
        rows["origin"] = f"weights converted from {origin}, not trained here"
    else:
        phases = (
            f"{counted(p.epochs, 'epoch')} at T={p.timesteps_as_text}, "
            f"{config.optimizer_of(i).kind}, "
            f"lr {config.optimizer_of(i).lr_as_text(config.batch.global_)}"
            for i, p in enumerate(config.phases)
        )
        rows["loss"] = "; then ".join(loss.as_text() for loss in config.losses())
        if config.init_checkpoint:
            rows["initial weights"] = config.init_checkpoint
        rows["phases"] = "; ".join(phases)
        rows["trained for"] = (
            f"{counted(description.step, 'step')} of {counted(config.batch.global_, 'sample')}"
            f"{', the best checkpoint' if description.which == 'best' else ''}, precision "
            f"{config.precision}, seed {config.seed}"
        )
    if description.averaged:
        rows["weights"] = description.averaged
    rows["accuracy"] = _accuracy(description)
    if description.binning:
        rows["bins of events"] = ", ".join(_listed(description.binning))
    if description.commit:
        rows["trained at commit"] = description.commit

    is_ours = isinstance(model, SpikingNetwork)
    # An adopted network only guarantees the logits of each timestep.
    call = (
        "model(x)  # logits, the mean over timesteps; model(x, per_timestep=True): by timestep"
        if is_ours
        else "model(x, per_timestep=True).mean(0)  # logits, the mean over timesteps"
    )
    if neuron.refusal(2) is None:
        call += "\nmodel.set_timesteps(2)  # fewer or more timesteps with the same weights"
    weights = checkpoint.MODEL_FILE
    if source is not None and source.startswith(_TIMMS_HUB):
        weights = source.replace(_TIMMS_HUB, HF)
    elif source is not None and ":" not in source:
        weights = TETDIST + source.partition(".")[2]
    found_by = ModelCardData(
        library_name="timm",
        # The hub has no tag for event frames.
        pipeline_tag="image-classification" if data.input_kind == "images" else None,
        tags=["spiking-neural-network", "tetdist"],
    )
    return f"""---
{found_by.to_yaml()}
---

# {config.name}

A {"spiking neural" if neuron.spiking else "ReLU"} network, exported with tetdist.

{markdown(["", ""], list(rows.items()))}

## Load

Install tetdist in a checkout by `pip install -e .` (networks and losses only) or
`pip install -e '.[train,cuda130]'` (with training and evaluation), then:

```python
import timm
import {"tetdist" if is_ours else type(model).__module__}  # registers the model

model = timm.create_model({_create_arguments(trained, source)}).eval()
{call}
```

{_preparation(trained)}

`{typed("eval")} {weights} --data ROOT` evaluates it, and
`init_checkpoint={weights}` starts a training from it.

## Recipe

With tetdist {tetdist.__version__}:

```yaml
{_recipe(trained).rstrip()}
```
"""


def _listed(values: dict[str, Any]) -> list[str]:
    return [f"{key} {value}" for key, value in values.items()]


def _accuracy(description: checkpoint.Description) -> str:
    validation = description.validation
    if not validation:
        return "not measured with this file"
    held_out = description.config["data"].get("held_out")
    of = "samples held out of the training split" if held_out else "the validation split"
    rest = f"of {of}, with these weights"
    if description.which == "best":
        rest += ", which were chosen on the same split"
    top5 = f" {validation['top5']:.2f} % top-5," if validation["top5"] < 100 else ""
    return f"{validation['top1']:.2f} % top-1,{top5} {rest}"


def _create_arguments(trained: Trained, source: str | None) -> str:
    if source is not None:
        return f'"{source}", pretrained=True'
    arguments = {"num_classes": trained.model.num_classes, **_model_arguments(trained)}
    inner = "".join(f"    {key}={value!r},\n" for key, value in arguments.items())
    return (
        f'\n    "{trained.config.model.name}",\n{inner}    checkpoint_path="model.safetensors",\n'
    )


def _metadata(trained: Trained, preparation: str) -> dict[str, str]:
    """Return the metadata of a program or graph as texts, all but the preparation as JSON."""
    values = trained.description.model_dump(include={"timesteps", "classes", "binning"})
    return {"preparation": preparation} | {k: json.dumps(v) for k, v in values.items() if v}


def _preparation(trained: Trained, time: str = "T, ") -> str:
    """Describe the input and the scaling of images, for a card or metadata."""
    data = trained.config.data
    if data.kind == "events":
        return f"Input: event frames, (B, {time}2, H, W), OFF before ON, as in the training data."
    values, then = "in [0, 1]", f"minus {list(data.mean)}, divided by {list(data.std)}."
    if data.images_as_events is not None:
        convert = f"frames(as_events(images, {data.images_as_events.ratio:g}, None)).float()"
        values, then = "as bytes (B, H, W, 3)", f"`{convert}` of tetdist.data.images_as_events."
    return (
        f"Input: RGB images {values}, shorter side resized to {data.resize_side} ("
        f"{data.interpolation}), centre crop of {data.image_size}, {then}"
    )


# --- programs -------------------------------------------------------------------------------------


def write_nir(trained: Trained, path: Path, dt: float) -> str:
    """Write the graph of `nir_graph` as a file of the package nir.

    Args:
        dt: Length of a timestep in seconds.
    """
    refuse_foreign(trained, "nir")
    import nir

    from tetdist.apps.weights.nir_graph import to_nir

    graph = to_nir(trained.model, trained.input_shape, dt)
    graph.metadata = _metadata(trained, _preparation(trained, "")) | graph.metadata
    with _aside(path) as aside:
        nir.write(aside, graph)
        again = nir.read(aside)
        assert (set(again.nodes), set(again.edges)) == (set(graph.nodes), set(graph.edges))
    return (
        f"{len(graph.nodes)} nodes, {len(graph.edges)} edges; run it for "
        f"{counted(trained.model.timesteps, 'timestep')} of {dt:g} s and average the outputs"
    )


def write_torch(trained: Trained, path: Path) -> str:
    """Write the unrolled network as a program of torch.export, for any batch size."""
    with torch.no_grad(), _aside(path) as aside:
        program = _traced(trained)
        contiguous = torch.ops.aten.contiguous.default
        for node in program.graph.find_nodes(op="call_function", target=contiguous):
            # ExecuTorch's operators would read memory in channels_last in the wrong order.
            if node.kwargs.get("memory_format") == torch.channels_last:
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
        program.graph_module.recompile()
        torch.export.save(program, aside, extra_files=_metadata(trained, _preparation(trained)))
        return _agreement(trained, torch.export.load(aside).module())


def write_onnx(trained: Trained, path: Path) -> str:
    """Write the unrolled network as an ONNX graph, for any batch size.

    It maps ``images`` or ``events`` to ``logits``, the mean over timesteps.
    """
    import onnxruntime

    name = trained.config.data.input_kind
    with torch.no_grad(), _aside(path) as aside:
        program = _onnx_program(_traced(trained), [name], ["logits"], ({0: "batch"},))
        program.model.metadata_props.update(_metadata(trained, _preparation(trained)))
        program.save(aside, external_data=False)
        session = onnxruntime.InferenceSession(aside, providers=["CPUExecutionProvider"])

        def run(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {name: x.numpy()})[0])

        return _agreement(trained, run)


def _onnx_program(
    traced: torch.export.ExportedProgram,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
) -> torch.onnx.ONNXProgram:
    # torch's exporter would warn of deprecated functions that it uses, and of axes of one name.
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            traced,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None
    return program


class _Step(nn.Module):
    """Timestep of a network, as a function of its frame and the previous membranes."""

    def __init__(self, model: SpikingNetwork) -> None:
        super().__init__()
        self.network = model
        self.layers = carrying_layers(model)

    def forward(self, frame: Tensor, membranes: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        layers = list(self.layers.values())
        return run_step(self.network, self.network.frame(frame, 0), layers, membranes)


class OnnxStep:
    """A network's step as an ONNX program of onnxruntime, for any batch size.

    It maps ``frame``, (B, C, H, W), and a state for each layer of neurons to the timestep's
    ``logits``, (B, K), and the next states, whose names have the prefix ``next_``.

    Args:
        path: File that `save_step` or `integer_onnx.save_step` wrote.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def at_rest(self, samples: int) -> dict[str, Any]:
        """Return the states before the first step: zeros."""
        kinds = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
        _, *states = self._session.get_inputs()
        sizes = {x.name: [samples if n == "batch" else n for n in x.shape] for x in states}
        return {one.name: np.zeros(sizes[one.name], kinds[one.type]) for one in states}

    def run(self, frame: Tensor, states: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the timestep's logits and the states after it."""
        logits, *after = self._session.run(None, {"frame": frame.numpy(), **states})
        return torch.from_numpy(logits), dict(zip(states, after, strict=True))


def save_step(model: SpikingNetwork, frame: Tensor, path: Path, metadata: dict[str, str]) -> None:
    """Write a network's step for `OnnxStep`.

    Args:
        model: A network that can be streamed, in evaluation mode and float32, on the CPU.
        frame: Example input, (2, C, H, W) or more.
    """
    if type(model).frame is not SpikingNetwork.frame:
        raise UserError(
            f"--format onnx-step needs equal timesteps, but {type(model).__name__} adds "
            "another value to the input at each; export it with --format onnx"
        )
    step = _Step(model)
    names = [f"state_{name.replace('.', '_')}" for name in step.layers]

    def shapes(batch: Any) -> tuple[Any, ...]:
        return {0: batch}, [{layer.neuron.sample_axis: batch} for layer in step.layers.values()]

    states = [torch.zeros_like(one) for one in step(frame, None)[1]]
    with _reporting_trace_errors(type(model).__name__):
        axes = shapes(torch.export.Dim("batch"))
        traced = torch.export.export(step, (frame, states), dynamic_shapes=axes, strict=False)
    outputs = ["logits", *(f"next_{name}" for name in names)]
    program = _onnx_program(traced, ["frame", *names], outputs, shapes("batch"))
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def write_onnx_step(trained: Trained, path: Path) -> str:
    """Write one timestep as the ONNX graph of `OnnxStep`."""
    refuse_foreign(trained, "onnx-step")
    model = trained.model
    with torch.no_grad(), _aside(path) as aside:
        is_events = model.input_kind == "events"
        x = trained.examples(2)
        metadata = _metadata(trained, _preparation(trained, ""))
        save_step(model, x[:, 0] if is_events else x, aside, metadata)
        step = OnnxStep(aside)

        def run(x: Tensor) -> Tensor:
            states, total = step.at_rest(len(x)), torch.zeros(())
            for t in range(model.timesteps):
                logits, states = step.run(x[:, t] if is_events else x, states)
                total = total + logits
            return total / model.timesteps

        return _agreement(trained, run)


# --- integers --------------------------------------------------------------------------------


def write_integers(trained: Trained, folder: Path) -> str:
    """Write the integers of a network, and their description as JSON."""
    network = convert(trained, trained.model.timesteps)
    with _aside(folder) as aside:
        aside.mkdir(parents=True)
        tensors = {
            f"{layer}.{key}": torch.from_numpy(value)
            for layer in network.values
            for key, value in network.numbers(layer).items()
        }
        (aside / checkpoint.MODEL_FILE).write_bytes(serialize(tensors))
        description = {"preparation": _byte_preparation(trained)} | network.description
        description |= {"class_names": trained.description.classes}
        (aside / INTEGERS_FILE).write_text(json.dumps(description, indent=1) + "\n")
    return f"{checkpoint.MODEL_FILE}, integers, and {INTEGERS_FILE}, {_proven(network)}"


def write_integer_step(trained: Trained, path: Path) -> str:
    """Write one timestep in integers as the ONNX graph of `OnnxStep`."""
    from tetdist.apps.weights.integer_onnx import save_step

    network = convert(trained, trained.model.timesteps)
    metadata = _metadata(trained, _byte_preparation(trained))
    with torch.no_grad(), _aside(path) as aside:
        save_step(network, aside, metadata | {"logit": str(network.description["logit"])})
        step, frames = OnnxStep(aside), network.frames(trained.examples(_CHECKED))
        states, membranes = step.at_rest(_CHECKED), dict[str, Tensor]()
        for t in range(network.timesteps):
            frame = frames[t if len(frames) > 1 else 0].contiguous()
            logits, states = step.run(frame, states)
            expected, membranes = network.step(frame, membranes)
            if not torch.equal(logits.double(), expected):
                raise UserError(
                    "--int8: onnxruntime's sums of integers are wrong on this processor, so the "
                    "graph cannot be checked here; export it on another one"
                )
    return f"onnxruntime's integers are the definition's on this processor; {_proven(network)}"


def _proven(network: IntegerNetwork) -> str:
    return f"ranges proven for {counted(network.timesteps, 'timestep')}"


def _byte_preparation(trained: Trained) -> str:
    if trained.config.data.input_kind == "events":
        return "Input: bytes (2, H, W), numbers of events, OFF before ON, as in the training data."
    data = trained.config.data
    return (
        f"Input: bytes (3, H, W) of RGB images, shorter side resized to {data.resize_side} "
        f"({data.interpolation}), centre crop of {data.image_size}."
    )


class _MeanLogits(nn.Module):
    """Adopted network, with the mean over timesteps as its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x, per_timestep=True)
        return logits.mean(0)


def _mean_logits(model: nn.Module) -> nn.Module:
    """Return the model as a function from its input to the mean logits over timesteps."""
    return model if isinstance(model, SpikingNetwork) else _MeanLogits(model).eval()


def _traced(trained: Trained) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    with _reporting_trace_errors(trained.config.model.name):
        return torch.export.export(
            _mean_logits(trained.model),
            (trained.examples(2),),
            dynamic_shapes=({0: batch},),
            strict=False,
        )


@contextmanager
def _reporting_trace_errors(network: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises many kinds
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"torch cannot trace {network} for a variable batch size ({reason}); export it as "
            "safetensors"
        ) from error


def _agreement(trained: Trained, run: Callable[[Tensor], Tensor]) -> str:
    """Compare a program's logits with the model's, on random inputs.

    If a membrane equals the threshold up to rounding, a spike may flip and change one sample's
    logits. A wrong program is wrong for most samples, so the median decides.
    """
    x = trained.examples(_CHECKED)
    expected = _mean_logits(trained.model)(x)
    difference = (run(x) - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)
    assert difference.median() < _TOLERANCE, f"the program differs by {difference.tolist()}"
    text = (
        f"its logits match the model's on {_CHECKED} random inputs, relative difference "
        f"{difference.median():.1e} (median), {difference.max():.1e} (largest)"
    )
    if torch.equal(expected, expected[:1].expand_as(expected)):
        text += "; a weak check, because the network's logits are the same for all inputs"
    return text


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` at the end."""
    # Keep the suffix, which some of the libraries check.
    with explaining(path), made_aside(path, ending=path.suffix) as aside:
        yield aside
