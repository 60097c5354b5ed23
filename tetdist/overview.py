"""Several runs side by side: what they reached, and the mean and spread where only seeds differ."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetdist import plots
from tetdist.config import OPERATIONAL_KEYS

# What may differ within a group, besides what has no effect on the result.
OF_THE_SEED = ("seed", "name", *OPERATIONAL_KEYS)


@dataclass(frozen=True)
class RunRecord:
    """A run: its name, the lines of its metrics, and its flattened configuration if it has one."""

    name: str
    lines: list[dict[str, Any]]
    configuration: dict[str, Any] | None

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def result(self) -> dict[str, Any]:
        """What it reached; None where it has not been measured."""
        train, val = self.of_kind("train"), self.of_kind("val")
        last_train, last_val = (lines[-1] if lines else {} for lines in (train, val))
        best = max(val, key=lambda line: line["top1"], default={})
        speeds = sorted(line["samples_per_s"] for line in train if "samples_per_s" in line)
        return {
            "run": self.name,
            "step": max((line["step"] for line in self.lines), default=None),
            "epoch": max((x["epoch"] for x in train + val if "epoch" in x), default=None),
            "top1": last_val.get("top1"),
            "best_top1": best.get("top1"),
            "best_epoch": best.get("epoch"),
            "val_loss": last_val.get("loss"),
            "train_loss": last_train.get("loss"),
            "samples_per_s": speeds[len(speeds) // 2] if speeds else None,
        }


def differing_keys(records: Sequence[RunRecord]) -> list[str]:
    """Keys of the configuration that have several values, without what a seed may change."""
    configurations = [record.configuration for record in records if record.configuration]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    return [
        key
        for key in keys
        if key not in OF_THE_SEED
        and key.partition(".")[0] != "cluster"
        and len({repr(configuration.get(key)) for configuration in configurations}) > 1
    ]


def group(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs that differ only by their seed, by a name that says what sets them apart from the rest.

    A run without a configuration is a group of its own.
    """
    keys = differing_keys(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        configuration = record.configuration
        what = (
            (f"run {record.name}",)
            if configuration is None
            else tuple(f"{key}={configuration.get(key)}" for key in keys)
        )
        groups.setdefault(what, []).append(record)
    return {
        (
            members[0].name if len(members) == 1 else ", ".join(what) or "the same but for the seed"
        ): members
        for what, members in groups.items()
    }


def group_result(name: str, members: Sequence[RunRecord]) -> dict[str, Any]:
    """Mean and standard deviation over the members that have been evaluated; None without any."""
    found: dict[str, Any] = {"group": name, "runs": [record.name for record in members]}
    for key in ("top1", "best_top1", "val_loss"):
        values = [value for r in members if (value := r.result()[key]) is not None]
        found[key] = sum(values) / len(values) if values else None
        found[f"{key}_deviation"] = plots.standard_deviation(values) if len(values) > 1 else None
    return found


def as_dict(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Ready for JSON."""
    keys = differing_keys(records)
    return {
        "runs": [
            record.result()
            | {"configuration": {key: (record.configuration or {}).get(key) for key in keys}}
            for record in records
        ],
        "groups": [group_result(name, members) for name, members in group(records).items()],
    }


def tables(records: Sequence[RunRecord]) -> list[list[list[str]]]:
    """The table of the runs and, if some differ only by their seed, that of the groups."""
    keys = differing_keys(records)
    head = ["run", "epoch", "top-1 %", "best", "at epoch", "val loss", "train loss", "per s"]
    rows = [[*head, *keys]]
    for record in records:
        result = record.result()
        rows.append(
            [
                result["run"],
                number(result["epoch"], "g"),
                number(result["top1"], ".2f"),
                number(result["best_top1"], ".2f"),
                number(result["best_epoch"], "g"),
                number(result["val_loss"], ".4f"),
                number(result["train_loss"], ".4f"),
                number(result["samples_per_s"], ".0f"),
                *(str((record.configuration or {}).get(key, "-")) for key in keys),
            ]
        )
    groups = group(records)
    if all(len(members) == 1 for members in groups.values()):
        return [rows]
    of_groups = [["group", "runs", "top-1 %", "best", "val loss"]]
    for name, members in groups.items():
        result = group_result(name, members)
        of_groups.append(
            [
                name,
                str(len(members)),
                *(
                    with_deviation(result[key], result[f"{key}_deviation"], spec)
                    for key, spec in (("top1", ".2f"), ("best_top1", ".2f"), ("val_loss", ".4f"))
                ),
            ]
        )
    return [rows, of_groups]


def number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def with_deviation(mean: float | None, deviation: float | None, spec: str) -> str:
    if deviation is None:
        return number(mean, spec)
    return f"{number(mean, spec)} +- {number(deviation, spec)}"


def plot(records: Sequence[RunRecord], out: Path) -> None:
    """Draw the runs' curves over each other, see `plots.runs`.

    Raises:
        UserError: matplotlib is not installed.
    """
    groups = group(records)
    members = list(itertools.chain(*groups.values()))
    title = f"{len(members)} runs"
    if len(groups) < len(members):
        title += "; of runs that differ only by their seed: mean and standard deviation"
    plots.runs({name: [(r.name, r.lines) for r in rs] for name, rs in groups.items()}, title, out)
