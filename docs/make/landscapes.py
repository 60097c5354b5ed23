"""Makes docs/results/landscape_DATA.md, .json and .png, with DATA digits or cifar10.

    python tools/study.py tet_vs_sdt_DATA --jobs 2 --only sdt_t4 --only tet_t4
    python docs/make/landscapes.py DATA

A direction moves every filter (a row of a weight of two or more dimensions) by its own norm, and
leaves norms, biases and neurons as they are: filter normalisation, as in Li et al., "Visualizing
the Loss Landscape of Neural Nets" (NeurIPS 2018), whose code names the latter biasbn. Every loss is
the true one, with running statistics recomputed at that point from the same samples.

Spikes jump, so the loss has no Hessian: a curvature is the second difference at a stated step h,
(L(h d) + L(-h d) - 2 L(0)) / h^2. Gradients are surrogate ones, in training mode; they only choose
two further directions, along which the true loss is measured as well.
"""

import argparse
import itertools
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pages
import torch
from torch import Tensor

from tetdist import order
from tetdist.apps.reports import style
from tetdist.apps.studies.numbers import Difference, detectable, holm, paired_difference
from tetdist.apps.weights.evaluated import evaluation_config
from tetdist.config.schema import RunConfig
from tetdist.data.batches import eval_batches
from tetdist.data.dali import Workers
from tetdist.data.splits import open_split
from tetdist.datasets.index import Index
from tetdist.distributed.world import join
from tetdist.losses import sdt_loss, tet_loss
from tetdist.models import SpikingNetwork
from tetdist.network import load_model
from tetdist.nn import dropout
from tetdist.nn.batch_norm import BatchNorm
from tetdist.nn.precision import autocast, parameter_type
from tetdist.storage import checkpoint
from tetdist.storage.files import parse_json
from tetdist.tables import markdown

DATA = ("digits", "cifar10")
SEEDS, SAMPLES, DIRECTIONS, RADIUS, GRID = range(5), 1000, 5, 0.5, 11
POINTS, ITERATIONS = 21, 8  # of a curve, and of the power iteration
MIDDLE, STEP = POINTS // 2, POINTS // 10  # the trained weights, and the step of a curvature
LOSSES = {"time_mean": "L_SDT", "per_timestep": "L_TET"}  # L_TET without its regulariser
KEYS = {
    "rise": "rise at half a filter's norm",
    "curvature": "curvature",
    "worst_rise": "largest rise found",
    "eigenvalue": "eigenvalue, lower bound",
}
HEAD = ["loss", "measure", "SDT", "TET", "TET - SDT", "minimum detectable effect", "p, Holm"]
Direction = list[Tensor]


class Landscape:
    """Losses of a network on some samples, as functions of its filters; its weights change."""

    def __init__(self, model: SpikingNetwork, config: RunConfig, index: Index) -> None:
        self.model, self.precision, micro = model, config.precision, config.batch.micro
        self.samples = min(-(-SAMPLES // micro), len(index) // micro) * micro
        chosen = order.permutation(len(index), 0, 0, order.named_stream("landscape"))
        parts = np.split(chosen[: self.samples], self.samples // micro)
        workers = Workers(device="cpu", device_id=None, threads=1, prefetch=config.data.prefetch)
        kind = parameter_type(self.precision)
        with eval_batches(config.data, index, parts, workers) as loader:
            batches = itertools.islice(loader, len(parts))
            self.batches = [(one.images.to(kind), one.labels) for one in batches]
        for layer in dropout.dropping(model):
            layer.rate = 0.0
        self.norms = [one for one in model.modules() if isinstance(one, BatchNorm)]
        self.filters = [p for p in model.parameters() if p.ndim > 1]
        self.origin = [p.detach().clone() for p in self.filters]
        self.lengths = [lengths(weight) for weight in self.origin]

    def random(self, number: int) -> Direction:
        """Return a random direction; networks of one architecture get the same, up to norms."""
        generator = torch.Generator().manual_seed(order.forward_seed(0, number, 0))
        return self.normalised([torch.randn(w.shape, generator=generator) for w in self.origin])

    def normalised(self, step: Direction) -> Direction:
        """Scale each filter's step to the filter's norm."""
        pairs = zip(step, self.lengths, strict=True)
        return [part * (length / lengths(part)).nan_to_num(0, 0, 0) for part, length in pairs]

    def steepest(self, gradient: Direction) -> Direction:
        """Return the direction of steepest ascent whose relative changes have squares of sum 1."""
        scaled = [g * length for g, length in zip(gradient, self.lengths, strict=True)]
        size = torch.stack([part.double().square().sum() for part in scaled]).sum().sqrt()
        return [p * (n / size).to(n) for p, n in zip(scaled, self.lengths, strict=True)]

    @torch.no_grad()
    def values(self, *steps: tuple[float, Direction]) -> dict[str, float]:
        """Return the losses and top-1 after some steps from the trained weights."""
        self.move(*steps)
        sums = torch.zeros(3, dtype=torch.float64)
        with autocast(torch.device("cpu"), self.precision):
            self.model.train()
            for number, (images, _) in enumerate(self.batches, start=1):
                for norm in self.norms:
                    norm.momentum = 1 / number  # gives each micro-batch the same weight
                self.model(images)
            self.model.eval()
            for images, labels in self.batches:
                logits = self.model(images, per_timestep=True)
                right = 100 * (logits.mean(0).argmax(-1) == labels).double().mean()
                losses = sdt_loss(logits, labels), tet_loss(logits, labels, lambda_=0.0)
                sums += torch.stack([one.double() for one in (*losses, right)]) * len(labels)
        return dict(zip((*LOSSES, "top1"), (sums / self.samples).tolist(), strict=True))

    def gradient(self, *steps: tuple[float, Direction]) -> Direction:
        """Return the surrogate gradient of L_SDT, with batch norms in training mode."""
        self.move(*steps)
        self.model.train()
        self.model.zero_grad()
        for images, labels in self.batches:
            with autocast(torch.device("cpu"), self.precision):
                loss = sdt_loss(self.model(images, per_timestep=True), labels)
            (loss * (len(labels) / self.samples)).backward()
        self.model.eval()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.filters]

    def sharpest(self, start: Direction, step: float) -> tuple[Direction, list[float]]:
        """Look for the direction of the largest curvature, by power iteration.

        The product of Hessian and direction is the difference of two surrogate gradients, ``step``
        to either side. Return the best direction, and each iteration's estimated eigenvalue.
        """
        best, estimates = start, list[float]()
        for _ in range(ITERATIONS):
            above, below = (self.gradient((sign * step, start)) for sign in (1, -1))
            product = [(a - b) / (2 * step) for a, b in zip(above, below, strict=True)]
            terms = [(x.double() * y).sum() for x, y in zip(product, start, strict=True)]
            estimates.append(float(sum(terms)))
            best = start if estimates[-1] == max(estimates) else best
            start = self.steepest(product)
        return best, estimates

    @torch.no_grad()
    def move(self, *steps: tuple[float, Direction]) -> None:
        for i, (parameter, weight) in enumerate(zip(self.filters, self.origin, strict=True)):
            parameter.copy_(sum((size * step[i] for size, step in steps), weight))


def lengths(weight: Tensor) -> Tensor:
    """Return the norm of each filter, (F, 1, ...)."""
    return weight.flatten(1).norm(dim=1).view(-1, *(1,) * (weight.ndim - 1))


def measure(landscape: Landscape, grid: int) -> dict[str, Any]:
    """Measure curves along random directions and two chosen by surrogate gradients, a grid in the
    plane of the first two (0: none), and the sharpness of each loss."""
    positions, center = np.linspace(-RADIUS, RADIUS, POINTS).tolist(), landscape.values()

    def curve(direction: Direction) -> dict[str, list[float]]:
        points = [landscape.values((at, direction)) if at else center for at in positions]
        return {key: [point[key] for point in points] for key in center}

    curves = {str(k): curve(landscape.random(k)) for k in range(DIRECTIONS)}
    gradient = landscape.gradient()
    curves["ascent"] = curve(landscape.normalised(gradient))
    start = landscape.steepest(gradient)
    sharpest, estimates = landscape.sharpest(start, RADIUS * STEP / MIDDLE)
    curves["sharpest"] = curve(sharpest)
    along, x, y = np.linspace(-RADIUS, RADIUS, grid).tolist(), *map(landscape.random, (0, 1))
    points = [[landscape.values((a, x), (b, y)) for a in along] for b in along]
    return {
        "samples": landscape.samples,
        "center": center,
        "sharpness": {
            loss: sharpness(np.array([found[loss] for found in curves.values()])) for loss in LOSSES
        },
        "surrogate_eigenvalues": estimates,
        "curves": curves,
        "surface": {key: [[p[key] for p in row] for row in points] for key in center if grid},
    }


def sharpness(curves: np.ndarray) -> dict[str, float]:
    """Summarise a loss along all directions, of which the last two are ascent and sharpest.

    ``rise``: at the radius, mean of both ways of random directions; ``curvature``: mean of random
    directions; ``worst_rise``: the largest of any point, a lower bound on that within the radius;
    ``eigenvalue``: curvature of the sharpest direction, a lower bound on the largest at its step.
    """
    rises = curves - curves[0, MIDDLE]
    edges = (rises[:-2, 0] + rises[:-2, -1]) / 2
    bends = (rises[:, MIDDLE + STEP] + rises[:, MIDDLE - STEP]) / (RADIUS * STEP / MIDDLE) ** 2
    return {
        "loss": float(curves[0, MIDDLE]),
        "rise": float(edges.mean()),
        "worst_rise": float(rises.max()),
        "curvature": float(bends[:-2].mean()),
        "eigenvalue": float(bends[-1]),
    }


def measured(study: Path) -> dict[str, Any]:
    """Measure the networks of a study that were trained at T=4, and compare them by seed."""
    networks, groups = list[dict[str, Any]](), dict[str, list[str]]()
    sharp = dict[str, list[dict[str, Any]]]()
    with join("cpu") as world:
        for loss, seed in itertools.product(("sdt_t4", "tet_t4"), SEEDS):
            run = study / f"{loss}-seed{seed}"
            print(run, file=sys.stderr)
            weights, description = checkpoint.load_model_file(run)
            config = evaluation_config(description.config, str(run), {"threads": 1})
            index = open_split(config.data, "train", world)
            model = load_model(config, index, weights, run, world)
            model.set_timesteps(description.timesteps)
            measurement = measure(Landscape(model.eval(), config, index), 0 if seed else GRID)
            about = {"checkpoint": str(run), "step": description.step, "seed": seed}
            networks.append(about | {"timesteps": model.timesteps} | measurement)
            groups.setdefault(loss, []).append(str(run))
            sharp.setdefault(loss, []).append(measurement["sharpness"])
    sdt, tet = sharp.values()
    by_loss = {
        loss: {
            key: vars(paired_difference(*([x[loss][key] for x in ones] for ones in (tet, sdt))))
            for key in KEYS
        }
        for loss in LOSSES
    }
    about = {"directions": DIRECTIONS, "radius": RADIUS, "groups": groups, "control": "sdt_t4"}
    return about | {"differences": {"tet_t4": by_loss}, "networks": networks}


def draw(values: dict[str, Any]) -> Any:
    """Draw curves, each the mean over random directions and networks with a band of one standard
    deviation, and the contours of each loss's first network; the plots of a row share levels."""
    of_path = {one["checkpoint"]: one for one in values["networks"]}
    groups = {name: [of_path[path] for path in paths] for name, paths in values["groups"].items()}
    radius, figure = values["radius"], style.new_figure(13, 13.2)
    top, *others = figure.subfigures(3, 1)
    axes = top.subplots(1, 3)
    titles = {key: f"{name}: {key.replace('_', ' ')}" for key, name in LOSSES.items()}
    for axis, (key, title) in zip(axes, (titles | {"top1": "Accuracy"}).items(), strict=True):
        for colour, (name, members) in zip(style.SERIES, groups.items(), strict=False):
            curves = [c[key] for one in members for k, c in one["curves"].items() if k.isdigit()]
            middle, spread = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)
            at = np.linspace(-radius, radius, len(middle))
            limits = (0, 100 if key == "top1" else None)
            band = np.clip([middle - spread, middle + spread], *limits)
            axis.fill_between(at, *band, color=colour, alpha=0.2, linewidth=0)
            axis.plot(at, middle, color=colour, linewidth=1.8, label=f"{name} ({len(members)})")
        axis.set_xlabel("step, relative to the norm of each filter")
        unit = style.ACCURACY if key == "top1" else "loss"
        style.finish(axis, title, unit, legend=axis is axes[0])
    for part, (key, title) in zip(others, titles.items(), strict=True):
        surfaces = {name: np.array(ones[0]["surface"][key]) for name, ones in groups.items()}
        lowest, highest = np.min([*surfaces.values()]), np.max([*surfaces.values()])
        levels = np.geomspace(max(lowest, highest / 1e4), highest, 16)
        for axis, (name, surface) in zip(
            part.subplots(1, len(surfaces)), surfaces.items(), strict=True
        ):
            at = np.linspace(-radius, radius, len(surface))
            lines = axis.contour(at, at, surface, levels=levels, cmap="viridis", linewidths=1.2)
            axis.clabel(lines, lines.levels[::3], fontsize=7, fmt="%.2g")
            axis.plot(0, 0, "+", color="black")
            axis.set_title(f"{name}, {title}", loc="left", fontsize=10)
            axis.set_xlabel("first direction")
            axis.set_ylabel("second direction")
            axis.set_aspect("equal")
    return figure


def write_page(data: str, values: dict[str, Any]) -> None:
    (by_loss,) = values["differences"].values()
    compared = {(loss, key): by_loss[loss][key] for loss in LOSSES for key in KEYS}
    corrected = dict(zip(compared, holm([one["p"] for one in compared.values()]), strict=True))
    of_path = {network["checkpoint"]: network["sharpness"] for network in values["networks"]}
    rows, verdicts = [], {loss: {"flatter": 0, "sharper": 0} for loss in LOSSES}
    for (loss, key), one in compared.items():
        p, groups = corrected[loss, key], (values["groups"][f"{k}_t4"] for k in ("sdt", "tet"))
        text = f"{one['mean']:+.2g} [{one['low']:+.2g}, {one['high']:+.2g}]"
        cells = [f"{mean(of_path[path][loss][key] for path in group):.3g}" for group in groups]
        effect = f"{detectable(Difference(**one)):.2g}"
        rows.append([f"`{loss}`", KEYS[key], *cells, text, effect, f"{p:.2g}"])
        if p < 0.05:
            verdicts[loss]["flatter" if one["mean"] < 0 else "sharper"] += 1
    n = Difference(**next(iter(compared.values()))).n
    answer = (
        f"Of {len(KEYS)} measures, TET is significantly "
        + " and ".join(
            f"flatter by {of['flatter']}, sharper by {of['sharper']} under {LOSSES[loss]}"
            for loss, of in verdicts.items()
        )
        + f", after Holm's correction for all {len(rows)}. The rise of L_SDT along random "
        f"directions, TET minus SDT, is {rows[0][4]}."
    )
    numbers = values | {"answer": answer}  # a page that is written anew has the old one
    page, table = pages.RESULTS / f"landscape_{data}.md", markdown(HEAD, rows, numbers=True)
    pages.write(page, answer, n, numbers, [table], draw(values))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", choices=DATA)
    parser.add_argument("--measured", type=Path, help="JSON file of an earlier page, to write anew")
    options = parser.parse_args()
    file = options.measured
    study = Path(f"runs/tet_vs_sdt_{options.data}")
    write_page(options.data, parse_json(file.read_bytes()) if file else measured(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
