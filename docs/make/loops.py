"""Train with the authors' own scripts beside tetdist's trainer, for docs/authors_loops.md.

    git clone https://github.com/brain-intelligence-lab/temporal_efficient_training tet
    git clone https://github.com/fangwei123456/Spike-Element-Wise-ResNet sew
    python docs/make/loops.py tet sew

Both scripts run whole, in float64 on the CPU, from equal weights and batches, with narrow networks
and stand-ins for their data. The authors' numbers go to tests/golden/loops.json, and the tables
into the page, whose other text is written by hand.
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pages
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler

from tetdist import order
from tetdist.apps.cli import train
from tetdist.apps.weights import foreign
from tetdist.datasets.index import index_splits
from tetdist.models import SpikingNetwork
from tetdist.nn.batch_norm import BatchNorm
from tetdist.storage import checkpoint, selection
from tetdist.storage.files import write_json
from tetdist.tables import markdown

GOLDEN, PAGE = pages.ROOT / "tests/golden/loops.json", pages.ROOT / "docs/authors_loops.md"
CLASSES, SIZE, BATCH = 6, 16, 8
SAMPLES = {"train": 83, "val": 24}  # 10 batches and 3 images; 3 batches
Numbers = dict[str, Any]


@dataclass(frozen=True)
class Loop:
    """A repository's script, with a network whose widths are divided by ``narrower``."""

    source: str
    commit: str
    narrower: int
    model: dict[str, Any]
    timesteps: int
    epochs: int
    optimizer: dict[str, Any]
    loss: dict[str, Any]

    def network(self) -> SpikingNetwork:
        options = self.model["arguments"] | {"neuron": self.neuron, "timesteps": self.timesteps}
        return timm.create_model(self.model["name"], num_classes=CLASSES, **options).double()

    @property
    def neuron(self) -> dict[str, Any]:
        return foreign.neuron_of(self.source, self.model["name"])


WIDTHS = {"width": 8, "stem_width": 4, "hidden_features": 16}
LOOPS = {
    "tet": Loop(
        source="tet",
        commit="8217492",
        narrower=16,
        model={"name": "spiking_resnet19", "arguments": WIDTHS},
        timesteps=2,
        epochs=4,
        optimizer={"kind": "adam", "lr": 0.001, "weight_decay": 5e-4},
        loss={"kind": "tet", "lambda": 1e-3, "phi": 1.0},
    ),
    "sew": Loop(
        source="sew",
        commit="cfc547c",
        narrower=8,
        model={"name": "sew_resnet18", "arguments": {"width": 8}},
        timesteps=4,
        epochs=3,
        optimizer={"kind": "sgd", "lr": 0.0025, "weight_decay": 1e-3},
        loss={"kind": "sdt"},
    ),
}


# --- samples and weights: the same on every processor ---------------------------------------------


def uniform(name: str, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Return numbers drawn by a name, which float32 can hold, in float64."""
    count = int(np.prod(shape))
    draws = order.uniforms(0, 0, np.zeros(1, np.int64), count, order.named_stream(name))
    return torch.from_numpy(low + (high - low) * draws).view(shape).float().double()


def images(split: str) -> tuple[Tensor, Tensor]:
    """Return pixels (N, 3, H, W), bytes, and labels (N,), in the order of the index."""
    labels = torch.arange(SAMPLES[split]) * CLASSES // SAMPLES[split]
    classes = uniform("classes", CLASSES, 3, SIZE, SIZE)[labels]
    return (127.5 + 75 * classes + 50 * uniform(split, *classes.shape)).round().byte(), labels


def weights(loop: Loop) -> dict[str, Tensor]:
    """Return weights and running statistics to begin with, by our names."""
    ranges = {"bias": (0.0, 0.5), "running_mean": (-0.3, 0.3), "running_var": (0.3, 1.0)}
    drawn = {}
    for key, value in loop.network().state_dict().items():
        bound = (6 / max(value[0].numel(), 1)) ** 0.5
        low, high = ranges.get(key.rpartition(".")[2], (0.6, 1.4))
        low, high = (-bound, bound) if value.ndim > 1 else (low, high)
        drawn[key] = uniform(f"{loop.source} {key}", *value.shape, low=low, high=high)
    return drawn


def digest(state: dict[str, Tensor]) -> dict[str, float]:
    """Return the projection of each tensor onto drawn numbers."""
    return {k: float((v * uniform(f"onto {k}", *v.shape)).sum()) for k, v in state.items()}


# --- tetdist's trainer ----------------------------------------------------------------------------


def command(file: str, *overrides: str) -> None:
    """Run the training command without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(["--config", file, *overrides]) == 0


def ours(
    loop: Loop, folder: Path, *overrides: str, run: Callable[..., object] = command
) -> Numbers:
    """Return tetdist's numbers; ``run(file, *overrides)`` trains."""
    phase = {"epochs": loop.epochs, "timesteps": loop.timesteps, "lr_changes": "epochs"}
    model = loop.model | {"neuron": loop.neuron}
    values: dict[str, Any] = {
        **{"model": model, "loss": loop.loss, "phases": [phase | {"optimizer": loop.optimizer}]},
        # The pixels less 127.5, divided by 64, have no rounding.
        "data": {"root": str(folder / "data"), "crop": "padded", "padding": 0, "flip": 0.0}
        | {"image_size": SIZE, "resize": SIZE, "mean": [0.5] * 3, "std": [64 / 255] * 3}
        | {"threads": 1},
        "batch": {"global": BATCH, "micro": BATCH, "eval": BATCH},
        **{"precision": "fp64", "execution": "reference", "engine": "torch", "device": "cpu"},
        **{"log_every": 1, "plots": False, "tracking": {"mlflow": False}},
        "init_checkpoint": str(folder / "weights.safetensors"),
        **{"name": "run", "runs_dir": str(folder)},
    }
    for split in SAMPLES:
        for number, (pixels, label) in enumerate(zip(*images(split), strict=True)):
            file = folder / f"data/{split}/{label}/{number:02}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file)
    index_splits(folder / "data")
    described = checkpoint.Description(
        config={"model": model}, classes=None, step=0, timesteps=loop.timesteps
    )
    checkpoint.write_model_file(folder / "weights.safetensors", weights(loop), described)
    (folder / "loop.yaml").write_text(yaml.safe_dump(values))
    run(str(folder / "loop.yaml"), *overrides)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    train_lines, val_lines = ([x for x in lines if x["kind"] == kind] for kind in SAMPLES)
    newest = selection.last(folder / "run/checkpoints")
    assert newest is not None
    return {
        "losses": [line["loss"] for line in train_lines],
        "rates": [line["lr"] for line in train_lines],
        "top1": [line["top1"] for line in val_lines],
        "val_losses": [line["loss"] for line in val_lines],
        "state": load_file(newest / "model.safetensors"),
    }


@contextlib.contextmanager
def stem_counted_once() -> Iterator[None]:
    """Move the running variance of an image's stem as of one copy of it, not of T."""
    forward = BatchNorm.forward
    with mock.patch.object(BatchNorm, "forward", lambda self, x, _copies=1: forward(self, x)):
        yield


# --- the authors' scripts -------------------------------------------------------------------------


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Samples in tetdist's order of each epoch, whichever the authors' sampler asks for."""

    def __init__(self, split: str, count: int) -> None:
        self.pixels, self.labels = images(split)
        total, self.count = len(self.labels), count
        epochs = (
            order.permutation(total, 0, epoch)[:count] if split == "train" else range(total)
            for epoch in itertools.count()
        )
        self.numbers = itertools.chain.from_iterable(epochs)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, _: int) -> tuple[Tensor, Tensor]:
        number = int(next(self.numbers))
        return (self.pixels[number].double() - 127.5) / 64, self.labels[number]


def stand_in(**names: Any) -> Any:
    module = ModuleType("stand_in")
    vars(module).update(names)
    return module


@dataclass
class Repository:
    """A fetched repository, whose files become modules.

    Attributes:
        keep_last: Train on an epoch's last, smaller batch, as the authors do.
    """

    loop: Loop
    folder: Path
    keep_last: bool = False
    numbers: Numbers = field(
        default_factory=lambda: {"losses": [], "rates": [], "top1": [], "val_losses": []}
    )

    def data(self) -> tuple[Samples, Samples]:
        count = SAMPLES["train"] if self.keep_last else SAMPLES["train"] // BATCH * BATCH
        return Samples("train", count), Samples("val", SAMPLES["val"])

    def module(self, name: str, path: str, run_as: str | None = None) -> Any:
        """Run a file; networks are narrowed, and their spikes have the input's type."""
        show = ["git", "-C", str(self.folder), "show", f"{self.loop.commit}:{path}"]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        if name in ("models.layers", "models.resnet_models", "sew_resnet"):

            def narrow(width: re.Match[str]) -> str:
                return str(int(width[0]) // self.loop.narrower)

            text = re.sub(r"\b(64|128|256|512)\b", narrow, text).replace(".float()", ".to(input)")
        sys.modules[name] = module = ModuleType(run_as or name)
        exec(compile(text, path, "exec"), vars(module))
        return module

    def loaded(self, model: Any) -> nn.Module:
        """Give a network of theirs the drawn weights."""
        self.model = model.double()
        places = {value.data_ptr(): value for value in model.state_dict().values()}
        addresses = {
            key: torch.full_like(value, value.data_ptr(), dtype=torch.float64)
            for key, value in model.state_dict().items()
        }
        ours = foreign.convert(addresses, self.loop.source, self.loop.network()).weights
        for key, value in weights(self.loop).items():
            places[int(ours[key].flatten()[0])].copy_(value)
        return self.model

    def result(self) -> Numbers:
        state = self.model.state_dict()
        converted = foreign.convert(state, self.loop.source, self.loop.network())
        assert not converted.missing + converted.unexpected
        return self.numbers | {"state": converted.weights}


def run_tet(repo: Repository) -> None:
    """Run main_training_parallel.py, with ResNet-19 for VGGSNN, and weight decay."""
    sys.modules["models"] = ModuleType("models")
    repo.module("models.layers", "models/layers.py")
    network = repo.module("models.resnet_models", "models/resnet_models.py")
    functions = repo.module("functions", "functions.py")
    loss_of = functions.TET_loss

    def built() -> nn.Module:
        model = network.resnet19(num_classes=CLASSES)
        model.T = repo.loop.timesteps
        return repo.loaded(model)

    def loss(*arguments: Any) -> Tensor:
        value = loss_of(*arguments)
        repo.numbers["losses"].append(value.item())
        return value

    class Adam(torch.optim.Adam):
        def step(self, *arguments: Any) -> None:  # type: ignore[override]  # theirs gives none
            repo.numbers["rates"].append(self.param_groups[0]["lr"])
            super().step(*arguments)

    def log(text: str) -> None:
        if match := re.search(r"\t Test acc=(.*)", text):
            repo.numbers["top1"].append(float(match[1]))

    functions.TET_loss, functions.get_logger = loss, lambda _: SimpleNamespace(info=log)
    sys.modules["models.VGG_models"] = stand_in(VGGSNN=built)
    sys.modules["data_loaders"] = stand_in(build_dvscifar=lambda _: repo.data())
    sys.argv = ["main", "-j0", f"-b{BATCH}", f"--epochs={repo.loop.epochs}"]
    decay = repo.loop.optimizer["weight_decay"]
    with mock.patch.object(torch.optim, "Adam", partial(Adam, weight_decay=decay)):
        repo.module("main_training", "main_training_parallel.py", run_as="__main__")


def run_sew(repo: Repository) -> None:
    """Run imagenet/train.py, with spikingjelly 2.0's neuron, and its container as TET has it."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    node = partial(neuron.IFNode, step_mode="m", surrogate_function=surrogate.ATan(alpha=2.0))
    sys.modules["spikingjelly.clock_driven"] = stand_in(
        functional=functional, layer=sys.modules["models.layers"]
    )
    sys.modules["spikingjelly.cext"] = stand_in(neuron=stand_in(MultiStepIFNode=node))
    sys.modules["spiking_resnet"] = stand_in()
    utils = repo.module("utils", "imagenet/utils.py")
    network = repo.module("sew_resnet", "imagenet/sew_resnet.py")
    script, built = repo.module("train", "imagenet/train.py"), network.sew_resnet18

    class Logger(utils.MetricLogger):  # type: ignore[name-defined]  # a module made here
        def update(self, **values: float) -> None:
            if "lr" in values:
                repo.numbers["losses"].append(values["loss"])
                repo.numbers["rates"].append(values["lr"])
            super().update(**values)

    def scalar(name: str, value: float, _epoch: int) -> None:
        if key := {"test_loss": "val_losses", "test_acc1": "top1"}.get(name):
            repo.numbers[key].append(value)

    def writer(folder: str, **_: int) -> SimpleNamespace:
        Path(folder).mkdir(parents=True)
        return SimpleNamespace(add_scalar=scalar)

    utils.MetricLogger, script.SummaryWriter = Logger, writer
    network.sew_resnet18 = lambda **options: repo.loaded(built(num_classes=CLASSES, **options))
    samples = repo.data()
    script.load_data = lambda *_: (*samples, *map(SequentialSampler, samples))
    epochs, decay = repo.loop.epochs, repo.loop.optimizer["weight_decay"]
    flags = f"-j 0 -b {BATCH} --epochs {epochs} --cos_lr_T {epochs} --device cpu --tb --wd {decay}"
    flags += f" --model sew_resnet18 --connect_f ADD --T {repo.loop.timesteps}"
    sys.argv = ["train", *flags.split()]
    script.main(script.parse_args())


def theirs(name: str, folder: Path, keep_last: bool = False) -> Numbers:
    repo = Repository(LOOPS[name], folder.resolve(), keep_last)
    script = {"tet": run_tet, "sew": run_sew}[name]
    silence = contextlib.redirect_stdout(io.StringIO())
    # SEW's script writes into the working folder.
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), silence:
        script(repo)
    return repo.result()


# --- the page -------------------------------------------------------------------------------------


def largest(a: Any, b: Any) -> float:
    """Return the largest difference, relative to the largest value."""
    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (a, b))
    return float((a - b).abs().max() / b.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tet", type=Path, help="clone of TET's repository")
    parser.add_argument("sew", type=Path, help="clone of SEW-ResNet's repository")
    folders = vars(parser.parse_args())
    rows, choices, golden = [], [], {}

    def trained(loop: Loop, *overrides: str) -> Numbers:
        with tempfile.TemporaryDirectory() as folder:
            return ours(loop, Path(folder), *overrides)

    for name, loop in LOOPS.items():
        authors = theirs(name, folders[name])
        golden[name] = authors | {"state": digest(authors["state"])}
        runs = {loop.model["name"]: trained(loop)}
        if name == "sew":
            with stem_counted_once():
                runs["the same, stem counted once"] = trained(loop)
        for label, run in runs.items():
            parts: dict[bool, list[float]] = {True: [], False: []}
            for key, value in authors["state"].items():
                parts["running" in key].append(largest(run["state"][key], value))
            cells = [largest(run[key], authors[key]) for key in ("losses", "rates")]
            cells += [max(parts[False]), max(parts[True])]
            val = "val_losses" if authors["val_losses"] else "top1"
            cells.append(largest(run[val], authors[val]))
            steps = str(len(authors["losses"]))
            rows.append([name.upper(), label, steps, *(f"{cell:.1e}" for cell in cells)])
        (own, *_), by_step = runs.values(), trained(loop, "phases.0.lr_changes=steps")
        kept = theirs(name, folders[name], keep_last=True)
        late = [np.mean(run["losses"][-10:]) for run in (own, by_step)]
        late.append(np.mean(kept["losses"][-11:]))
        choices.append([name.upper(), *(f"{value:.4f}" for value in late)])
        steps = f"{len(own['losses'])}, {len(kept['losses'])}"
        choices[-1] += [steps, f"{max(kept['top1']):.1f}, {kept['top1'][-1]:.1f}"]
    head = ["loop", "network", "steps", "losses", "learning rates", "weights"]
    head += ["running statistics", "validation"]
    columns = ["last epoch's mean loss", "tetdist", "rate by step", "last batch kept", "steps"]
    columns.append("best, last top-1")
    write_json(GOLDEN, golden)
    tables = [markdown(head, rows), markdown(columns, choices)]
    print(*tables, sep="\n\n")
    PAGE.write_text(pages.with_tables(PAGE.read_text(), tables))


if __name__ == "__main__":
    main()
