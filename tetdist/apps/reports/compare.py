"""Comparison of runs: their results, the keys that differ, their metrics, weights and curves."""

import itertools
import json
import math
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from tetdist.apps.reports import style
from tetdist.apps.reports.run_status import read_status
from tetdist.errors import UserError
from tetdist.storage import selection
from tetdist.tables import aligned, number
from tetdist.tracking.metrics_file import each_line, points_of
from tetdist.tracking.progress import held_out
from tetdist.wording import counted

# Values that depend on the clock or the machine.
OF_THE_CLOCK = (
    "time",
    "samples_per_s",
    "image_timesteps_per_s",
    "data_wait",
    "step_seconds",
    "slowest",
    "slowest_host",
    "eta_s",
    "seconds",
)
WIDTH = 100  # columns of the output
SHOWN = 8  # largest number of metrics shown of the step at which two runs first differ


@dataclass(frozen=True)
class Run:
    """A run to compare.

    Attributes:
        label: Its letter in the output.
        lines: Its lines of metrics, by step and kind.
        configuration: Its configuration, by dotted key.
    """

    label: str
    folder: Path
    lines: dict[tuple[int, str], dict[str, Any]]
    configuration: dict[str, Any]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines.values() if line["kind"] == kind]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs from their folders; the first one is a, the second b, ..."""
    letters = (chr(ord("a") + i) if i < 26 else f"run {i + 1}" for i in itertools.count())
    return [_read(label, folder) for label, folder in zip(letters, folders, strict=False)]


def has_metrics(folder: Path) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.stat().st_size > 0


def _read(label: str, folder: Path) -> Run:
    config = folder / "config.yaml"
    from tetdist.config.loading import Draft
    from tetdist.config.messages import checked
    from tetdist.config.overrides import flatten
    from tetdist.config.schema import RunConfig
    from tetdist.config.yaml_files import read_yaml

    lines = {(line["step"], line["kind"]): line for line in each_line(folder / "metrics.jsonl")}
    raw = configuration = read_yaml(config)
    # Keys that an older version did not know get their defaults, unless this version cannot parse
    # the configuration.
    with suppress(UserError):
        parsed = Draft(checked(RunConfig, raw, str(config)), str(config)).with_neuron()
        configuration = parsed.as_dict()
        # A range of T is one value, not three keys.
        for values, phase in zip(configuration["phases"], parsed.phases, strict=True):
            values["timesteps"] = phase.timesteps_as_text
    return Run(label, folder, lines, flatten(configuration))


def compare(runs: Sequence[Run]) -> tuple[bool, str]:
    """Compare runs.

    Returns:
        True if all have the same metrics and weights, and a text to print: where two runs differ,
        or which of several are the same.
    """
    if len(runs) == 2:
        comparisons = [compared(*runs) for compared in (_metrics, _weights)]
        same, details = all(one for one, _ in comparisons), [text for _, text in comparisons]
    else:
        same, details = _groups(runs)
    verdict = "The runs are the same." if same else "The runs differ."
    return same, "\n\n".join([_results(runs, same), _configurations(runs), *details, verdict])


def _groups(runs: Sequence[Run]) -> tuple[bool, list[str]]:
    groups = list[list[Run]]()
    for run in runs:
        like_it = (one for one in groups if _metrics(one[0], run)[0] and _weights(one[0], run)[0])
        if (group := next(like_it, None)) is None:
            groups.append([run])
        else:
            group.append(run)
    alike = [", ".join(run.label for run in group) for group in groups if len(group) > 1]
    text = f"the same in {'; in '.join(alike)}" if alike else "different in all runs"
    return len(groups) == 1, [f"Metrics and weights: {text}."]


def _results(runs: Sequence[Run], same: bool) -> str:
    rows = [["", "run", "epoch", "T", "top-1 %", "at T=1", "best", "at epoch"]]
    for run in runs:
        for kind, name in (("val", str(run.folder)), ("val_ema", "its moving average")):
            evaluated = run.of_kind(kind)
            if not evaluated and kind == "val_ema":
                continue
            best = max(evaluated, key=lambda line: line["top1"], default={})
            last = evaluated[-1] if evaluated else {}
            top1 = held_out(last) + number(last.get("top1"), ".2f")
            cells = [number(last.get("epoch"), ".4g"), number(last.get("timesteps"), ""), top1]
            cells.append(number(next(iter(last.get("per_timestep_top1", ())), None), ".2f"))
            cells += [number(best.get("top1"), ".2f"), number(best.get("epoch"), ".4g")]
            rows.append([run.label if kind == "val" else "", _shortened(name, 46), *cells])
    seeds = "Another seed alone also changes top-1; a study compares settings over several seeds."
    lines = [aligned(rows, right=range(2, 8)), *[seeds] * (not same)]
    if len({line.get("samples") for run in runs for line in run.of_kind("val")} - {None}) > 1:
        lines.append("Evaluated on different data: top-1 is not comparable.")
    trained: dict[str, list[str]] = {}
    for run in runs:
        if (status := read_status(run.folder)).state == "finished":
            trained.setdefault(number(status.epoch, ".4g"), []).append(run.label)
        else:
            at = f"step {number(status.step, ',')} of {number(status.last_step, ',')}"
            lines.append(f"Not finished: {run.label} is {status.state} at {at}.")
    if len(trained) > 1:
        times = "; ".join(f"{', '.join(who)}: {epochs}" for epochs, who in trained.items())
        text = f"Trained for different numbers of epochs ({times}): top-1 is not comparable."
        lines.append(textwrap.fill(text, WIDTH))
    return "\n".join(lines)


def _configurations(runs: Sequence[Run]) -> str:
    """Return the keys with different values, and which runs have which value."""
    differing: dict[str, str] = {}
    most = max(3, len(runs) / 2)  # a value of more runs is that of the others
    for key in dict.fromkeys(key for run in runs for key in run.configuration):
        having: dict[str, list[str]] = {}
        for run in runs:
            value = run.configuration.get(key, "absent")
            text = value if isinstance(value, str) else json.dumps(value)  # as a file has it
            having.setdefault(text, []).append(run.label)
        if len(having) > 1 and key != "name" and "{}" not in having:  # whose keys are listed
            shown = [f"{', '.join(who)}: {v}" for v, who in having.items() if len(who) <= most]
            shown += [f"others: {value}" for value, who in having.items() if len(who) > most]
            differing[key] = "; ".join(shown)
    if not differing:
        return "Configuration: the same."
    width = max(map(len, differing))
    lines = [
        textwrap.fill(text, WIDTH, initial_indent=f"  {key:{width}}  ", subsequent_indent=" " * 4)
        for key, text in differing.items()
    ]
    return "\n".join([f"Configuration: {counted(len(lines), 'different key')}.", *lines])


def _metrics(a: Run, b: Run) -> tuple[bool, str]:
    """Return whether two runs have the same metrics, and where they first differ."""
    head, common = f"Metrics of {a.label} and {b.label}:", a.lines.keys() & b.lines.keys()
    differing: list[tuple[float, int, str, str, str]] = []
    has_all = True
    for step, kind in sorted(common):
        ours, others = (_numbers(run.lines[step, kind]) for run in (a, b))
        for name in ours | others:
            x, y = ours.get(name), others.get(name)
            if x is None or y is None:
                has_all = False
            elif relative := relative_difference(x, y):
                short = f"{x:.6g}", f"{y:.6g}"
                shown = short if len({*short}) > 1 else (repr(x), repr(y))
                differing.append((relative, step, name, *shown))
    if differing:
        step, (largest, at, of, *_) = differing[0][1], max(differing)
        rows = [(_shortened(name, 44), x, y) for _, s, name, x, y in differing if s == step]
        lines = [
            f"{head} they first differ at step {step}.",
            aligned([("", a.label, b.label), *rows[:SHOWN]]),
            *([f"  and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []),
            f"  largest relative difference: {largest:.2g} ({_shortened(of, 44)} at step {at})",
        ]
    elif not has_all:
        lines = [f"{head} the same values where both have one."]
    elif common:
        lines = [f"{head} the same in {counted(len(common), 'common line')}."]
    else:
        lines = [f"{head} no common step."]
    for run, other in ((a, b), (b, a)):
        if alone := sorted(run.lines.keys() - other.lines.keys()):
            step, kind = alone[0]
            lines_alone = f"{counted(len(alone), 'line')}, the first at step {step} ({kind})"
            lines.append(f"  only {run.label} has {lines_alone}")
    return has_all and not differing and a.lines.keys() == b.lines.keys(), "\n".join(lines)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    """Return a line's measurements by their name in trackers: without the clock's, and settings."""
    left_out = (*OF_THE_CLOCK, "timesteps", "lr")
    return {name: value for name, value in points_of(line) if name.split("/")[1] not in left_out}


def relative_difference(a: float, b: float) -> float:
    """Return |a - b| divided by the larger of |a| and |b|; infinity if one is not finite.

    NaN equals NaN.
    """
    if a == b or (a != a and b != b):
        return 0.0
    return abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a - b) else math.inf


def _weights(a: Run, b: Run) -> tuple[bool, str]:
    """Compare the weights and running statistics of the last checkpoint that both runs have.

    Without a common checkpoint they count as the same.
    """
    saved = [_checkpoints(run.folder) for run in (a, b)]
    step = max(saved[0].keys() & saved[1].keys(), default=None)
    head = f"Weights of {a.label} and {b.label}"
    if step is None:
        return True, f"{head}: no checkpoint of the same step."
    ours, others = (_tensors(checkpoints[step] / selection.MODEL_FILE) for checkpoints in saved)
    names = ours.keys() | others.keys()
    different = [name for name in names if ours.get(name) != others.get(name)]
    if not different:
        return True, f"{head} at step {step}: bitwise identical."
    return False, f"{head} at step {step}: {len(different)} of {len(names)} tensors differ."


def _checkpoints(folder: Path) -> dict[int, Path]:
    """Return a run's checkpoints by step; of several of a step, the last one."""
    paths = selection.all_in(folder / "checkpoints")
    return {selection.step_and_repeat(path)[0]: path for path in paths}


def _tensors(file: Path) -> dict[str, dict[str, Any]]:
    """Return shape, type and bytes of each tensor of a model file, without torch."""
    try:
        return dict(deserialize(file.read_bytes()))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable model file ({error})") from error


def _shortened(text: str, length: int) -> str:
    """Shorten a long text, such as a path, to its end."""
    return text if len(text) <= length else f"...{text[3 - length :]}"


def plot(runs: Sequence[Run], out: Path) -> None:
    """Draw the runs' losses and top-1 into one PNG."""
    figure = style.new_figure(13, 4.6)
    losses = dict.fromkeys(str(run.configuration.get("loss.kind")) for run in runs)
    note = f" ({', '.join(losses)}: not comparable)" if len(losses) > 1 else ""
    panels = (
        ("train", "loss", f"Training loss{note}", "loss"),
        ("val", "loss", "Validation loss", "loss"),
        ("val", "top1", "Validation top-1", style.ACCURACY),
    )
    for axis, (kind, key, title, unit) in zip(figure.subplots(1, 3), panels, strict=True):
        for run, colour in zip(runs, itertools.cycle(style.SERIES), strict=False):
            lines = run.of_kind(kind)
            points = style.series(style.steady_part(lines) if kind == "train" else lines, key)
            style.markers(axis, *points, colour, f"{run.label}  {_shortened(str(run.folder), 60)}")
        axis.set_xlabel("epoch")
        style.finish(axis, title, unit, legend=False)
    named = axis.get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    style.save(figure, out)
