"""Table of several runs: their results, and mean and standard deviation over seeds."""

import itertools
import re
import statistics
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tetdist.apps.reports import overlay
from tetdist.apps.reports.compare import open_run, reading
from tetdist.config.identity import OPERATIONAL_KEYS, PATH_KEYS, absolute_path
from tetdist.tables import number
from tetdist.tracking.metrics_file import each_line

# Keys that may differ within a group; OPERATIONAL_KEYS have no effect on the result.
OF_THE_SEED = ("seed", "name", *OPERATIONAL_KEYS)

# Values of a line that tables and plots show.
KEPT = ("kind", "step", "epoch", "phase", "loss", "top1", "per_timestep_top1")
# Maximum length of a value in a table or a legend; --json has all of it.
SHOWN_CHARACTERS = 24


@dataclass(frozen=True)
class RunRecord:
    """Run, as input of tables and plots."""

    name: str  # of its folder, with the path if several folders have the same name
    lines: list[dict[str, Any]]  # its metrics, with the values in `KEPT`
    speeds: Sequence[float]  # samples per second of each line of training
    configuration: dict[str, Any] | None  # with dotted keys

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]

    def of_average(self) -> "RunRecord":
        """Return the run with the evaluations of its moving average instead of its weights'."""
        lines = [
            line | {"kind": "val"} if line["kind"] == "val_ema" else line
            for line in self.lines
            if line["kind"] != "val"
        ]
        return replace(self, name=f"{self.name} (EMA)", lines=lines)

    def result(self) -> dict[str, Any]:
        """Return the run's results; None for values that were not measured."""
        train, val = self.of_kind("train"), self.of_kind("val")
        last_train, last_val = (lines[-1] if lines else {} for lines in (train, val))
        best = max(val, key=lambda line: line["top1"], default={})
        return {
            "run": self.name,
            "step": max((line["step"] for line in self.lines), default=None),
            "epoch": max((x["epoch"] for x in train + val if "epoch" in x), default=None),
            "top1": last_val.get("top1"),
            "best_top1": best.get("top1"),
            "best_epoch": best.get("epoch"),
            **self._of_average(),
            "val_loss": last_val.get("loss"),
            "train_loss": last_train.get("loss"),
            "samples_per_s": statistics.median_high(self.speeds) if self.speeds else None,
        }

    def _of_average(self) -> dict[str, Any]:
        """Return the results of the moving average of the weights, if the run has one."""
        reached = [line["top1"] for line in self.of_kind("val_ema")]
        return {"ema_top1": reached[-1], "best_ema_top1": max(reached)} if reached else {}


def read_records(paths: Sequence[Path], *, curves: bool) -> list[RunRecord]:
    """Read runs; without ``curves``, of training only the last line before each evaluation."""
    folders = Counter(path.name for path in paths if path.is_dir())
    records = []
    for path in paths:
        lines, speeds = list[dict[str, Any]](), array("d")
        with reading():
            file, configuration = open_run(path, effective=True)
            for line in each_line(file):
                if line["kind"] == "train":
                    if "samples_per_s" in line:
                        speeds.append(line["samples_per_s"])
                    if not curves and lines and lines[-1]["kind"] == "train":
                        lines.pop()
                lines.append({key: line[key] for key in KEPT if key in line})
        name = path.name if folders[path.name] == 1 else str(path)
        records.append(RunRecord(name, lines, speeds, configuration))
    return records


def differing_keys(records: Sequence[RunRecord]) -> list[str]:
    """Return the configuration's keys with several values, except those that vary by seed."""
    configurations = [record.configuration for record in records if record.configuration]
    keys = dict.fromkeys(key for configuration in configurations for key in configuration)
    return [
        key
        for key in keys
        if key not in OF_THE_SEED
        and key.partition(".")[0] != "cluster"
        # A run lacks keys without effect; it differs in the key that makes them so.
        and len({repr(of_any_seed(key, c)) for c in configurations if key in c}) > 1
    ]


def of_any_seed(key: str, configuration: dict[str, Any]) -> Any:
    """Return the value of a key, with the seed removed from the paths of other runs.

    The runs of a study are named NAME-seed0, NAME-seed1, ..., and each begins with the weights, or
    the teacher, of its own seed: that does not count as a difference.
    """
    value = configuration.get(key)
    if key not in PATH_KEYS or not value:
        return value
    return re.sub(r"-seed\d+(?=/|$)", "-seed*", absolute_path(str(value)))


def group(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs that differ only by their seed, by a common name; sorted by name.

    The name is the runs' name without the seed or, if they have different names, the keys that
    distinguish them from the others. A run without a configuration forms its own group.
    """
    keys = differing_keys(records)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in records:
        values = record.configuration
        what = (
            (f"run {record.name}",)
            if values is None
            else tuple(repr(of_any_seed(key, values)) for key in keys)
        )
        groups.setdefault(what, []).append(record)
    names = {what: _common_name(members) for what, members in groups.items()}
    taken = Counter(names.values())
    distinct = _distinguishing(keys, [members[0] for members in groups.values()])
    named = {
        (
            name
            if (name := names[what]) and taken[name] == 1
            else _described(members[0], distinct) or "equal except for the seed"
        ): members
        for what, members in groups.items()
    }
    # Sorting gives the same runs the same colours in any order of arguments.
    return dict(sorted(named.items(), key=lambda item: by_number(item[0])))


def _common_name(members: Sequence[RunRecord]) -> str | None:
    if len(members) == 1:
        return members[0].name
    names = {re.sub(r"-seed\d+$", "", record.name) for record in members}
    return names.pop() if len(names) == 1 else None


def _distinguishing(keys: Sequence[str], records: Sequence[RunRecord]) -> list[str]:
    """Return the first keys whose values suffice to distinguish all records."""
    found: list[str] = []
    kinds = 1
    for key in keys:
        with_it = {
            tuple(repr(of_any_seed(k, record.configuration)) for k in (*found, key))
            for record in records
            if record.configuration is not None
        }
        if len(with_it) > kinds:
            found.append(key)
            kinds = len(with_it)
    return found


def _described(record: RunRecord, keys: Sequence[str]) -> str:
    if record.configuration is None:
        return f"run {record.name}"
    values = record.configuration
    return ", ".join(f"{key}={shortened(of_any_seed(key, values))}" for key in keys)


def by_number(name: str) -> list[tuple[str, int]]:
    """Return a sort key that puts t10 after t2."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def shortened(value: Any) -> str:
    """Shorten a value for a table; a long one, such as a path, keeps its end."""
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"...{text[3 - SHOWN_CHARACTERS :]}"


def group_result(name: str, members: Sequence[RunRecord]) -> dict[str, Any]:
    """Return mean and standard deviation over the evaluated members; None without any."""
    found: dict[str, Any] = {"group": name, "runs": [record.name for record in members]}
    for key in ("top1", "best_top1", "val_loss"):
        values = [value for r in members if (value := r.result()[key]) is not None]
        found[key] = sum(values) / len(values) if values else None
        found[f"{key}_deviation"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return found


def as_dict(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Return the runs and their groups, ready for JSON."""
    keys = differing_keys(records)
    return {
        "runs": [
            record.result()
            | {"configuration": {key: (record.configuration or {}).get(key) for key in keys}}
            for record in records
        ],
        "groups": [group_result(name, members) for name, members in group(records).items()],
    }


def tables(found: dict[str, Any]) -> list[list[list[str]]]:
    """Return the table of runs of `as_dict` and, if some differ only by seed, of groups."""
    runs = found["runs"]
    averaged = any("ema_top1" in run for run in runs)
    columns = {
        "epoch": ("epoch", "g"),
        "top1": ("top-1 %", ".2f"),
        "best_top1": ("best", ".2f"),
        "best_epoch": ("at epoch", "g"),
        "val_loss": ("val loss", ".4f"),
        "train_loss": ("train loss", ".4f"),
        "samples_per_s": ("per s", ".0f"),
    }
    if averaged:
        columns |= {"ema_top1": ("EMA top-1 %", ".2f"), "best_ema_top1": ("EMA best", ".2f")}
    head = ["run", *(title for title, _ in columns.values()), *runs[0]["configuration"]]
    rows = [head] + [
        [
            run["run"],
            *(number(run.get(key), spec) for key, (_, spec) in columns.items()),
            *("-" if x is None else shortened(x) for x in run["configuration"].values()),
        ]
        for run in runs
    ]
    if all(len(group["runs"]) == 1 for group in found["groups"]):
        return [rows]
    specs = {"top1": ".2f", "best_top1": ".2f", "val_loss": ".4f"}
    of_groups = [["group", "runs", *(columns[key][0] for key in specs)]] + [
        [
            group["group"],
            str(len(group["runs"])),
            *(_with_deviation(group[key], group[f"{key}_deviation"], specs[key]) for key in specs),
        ]
        for group in found["groups"]
    ]
    return [rows, of_groups]


def _with_deviation(mean: float | None, deviation: float | None, spec: str) -> str:
    if deviation is None:
        return number(mean, spec)
    return f"{number(mean, spec)} +- {number(deviation, spec)}"


def plot(
    records: Sequence[RunRecord],
    out: Path,
    published: tuple[str, list[float], list[float]] | None = None,
) -> None:
    """Draw the runs' curves, and a published one, into the same axes; see `overlay.runs`."""
    groups = group(records)
    members = list(itertools.chain(*groups.values()))
    title = "1 run" if len(members) == 1 else f"{len(members)} runs"
    if len(groups) < len(members):
        title += "; mean and standard deviation over runs that differ only by their seed"
    lines = {name: [record.lines for record in of_name] for name, of_name in groups.items()}
    overlay.runs(lines, title, out, published)
