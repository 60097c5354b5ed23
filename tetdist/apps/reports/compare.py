"""The differences of two runs: where their metrics part, by how much, and whether they saw the
same samples."""

import json
import math
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.tables import aligned
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.reports.runs_table import RunRecord

# And of the machine.
OF_THE_CLOCK = (
    "time",
    "samples_per_s",
    "data_wait",
    "eta_s",
    "gpu_memory",
    "gpu_energy",
    "seconds",
)

SHOWN = 8  # rows or items of what may be long; --json has all

# kind ("train", "val") -> step -> key -> value
Metrics = dict[str, dict[int, dict[str, Any]]]
# step -> how often each (id, crc32) was seen by all ranks together
Samples = dict[int, Counter[tuple[Any, int]]]


class Missing:
    """The value of a key that one of the two does not have."""

    def __repr__(self) -> str:
        return "-"


MISSING = Missing()


@dataclass(frozen=True)
class ComparedRun:
    """The parts of one run that are compared; None where a part is not there."""

    path: Path
    metrics: Metrics
    configuration: dict[str, Any] | None
    samples: Samples | None


@dataclass(frozen=True)
class Pair:
    """One key's two values; ``relative`` is their relative difference."""

    key: str
    a: Any
    b: Any
    relative: float = math.nan

    def as_dict(self) -> dict[str, Any]:
        """The pair, ready for JSON; a value that is missing is left out."""
        values = {"key": self.key, "a": self.a, "b": self.b, "relative": self.relative}
        if math.isnan(self.relative):  # of the configuration
            del values["relative"]
        return {key: value for key, value in values.items() if value is not MISSING}


@dataclass
class KeyResult:
    """The differences of one key of one kind over the steps that both runs have."""

    kind: str
    key: str
    common: int = 0  # steps at which a run has it
    different: int = 0  # of these, where it differs by more than the tolerance
    first: int | None = None
    largest: float = 0.0
    largest_at: int | None = None


@dataclass(frozen=True)
class MetricsResult:
    keys: list[KeyResult]
    # The first step at which a value differs, the kind of its line, and what differs there.
    first: tuple[int, str, list[Pair]] | None
    # Steps that only a and only b have, by kind.
    only: dict[str, tuple[list[int], list[int]]]
    common: int  # lines that both have


@dataclass(frozen=True)
class SamplesResult:
    common: int  # steps
    different: list[int]
    only: tuple[list[int], list[int]]
    # At the first different step: ids that only a and only b have (as often as that), and ids that
    # both have with other content.
    first_only: tuple[list[Any], list[Any]]
    first_content: list[Any]


@dataclass(frozen=True)
class Comparison:
    a: ComparedRun
    b: ComparedRun
    tolerance: float
    configuration: list[Pair] | None
    metrics: MetricsResult
    samples: SamplesResult | None

    @property
    def same(self) -> bool:
        metrics, samples = self.metrics, self.samples
        if metrics.first or any(a or b for a, b in metrics.only.values()):
            return False
        return samples is None or not (samples.different or any(samples.only))


# --- reading --------------------------------------------------------------------------------------


def read_run(path: Path, *, effective: bool = False) -> ComparedRun:
    """Read a run folder or a metrics.jsonl.

    Args:
        path: One of the two.
        effective: Leave out the keys of the configuration that have no effect.

    Raises:
        UserError: There is none, or something in it is damaged.
    """
    from tetdist.errors import UserError

    try:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"there is no {path}; give a run folder or a metrics.jsonl")
            return ComparedRun(path, read_values(path), None, None)
        if not (path / "metrics.jsonl").exists():
            raise UserError(f"{path} is no run folder: there is no metrics.jsonl in it")
        return ComparedRun(
            path,
            read_values(path / "metrics.jsonl"),
            read_configuration(path / "config.yaml", effective),
            read_samples(path),
        )
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror}") from error


def read_values(path: Path) -> Metrics:
    from tetdist.tracking.metrics_file import read_metrics

    metrics: Metrics = {}
    for line in read_metrics(path):
        metrics.setdefault(line["kind"], {})[line["step"]] = values_of(line)
    return metrics


def values_of(line: dict[str, Any]) -> dict[str, Any]:
    """A line's single values: entries of a dict as key.entry, of a list as key.t1, key.t2, ..."""
    values: dict[str, Any] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, dict):
            for entry, item in value.items():
                add(f"{key}.{entry}", item)
        elif isinstance(value, list):
            for t, item in enumerate(value, start=1):
                add(f"{key}.t{t}", item)
        else:
            values[key] = value

    for key, value in line.items():
        if key not in ("kind", "step", *OF_THE_CLOCK):
            add(key, value)
    return values


def read_configuration(path: Path, effective: bool) -> dict[str, Any] | None:
    from tetdist.config import checks, identity, loading
    from tetdist.config.yaml_files import read_yaml
    from tetdist.errors import UserError

    if not path.exists():
        return None
    try:
        values = read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); restore it") from error
    # A key that an older version did not know has its default. A configuration that cannot be read
    # is shown as it is.
    with suppress(UserError):
        parsed = loading.parse(values, str(path), warn=False)
        return checks.effective(parsed) if effective else identity.flatten(parsed.as_dict())
    return identity.flatten(values)


def read_samples(folder: Path) -> Samples | None:
    """The samples that all ranks saw at each step; None if the run has kept no record of them."""
    files = [
        file
        for file in sorted(folder.glob("samples-*.jsonl"))
        if re.fullmatch(r"samples-\d+\.jsonl", file.name)
    ]
    if not files:
        return None
    samples: Samples = {}
    for file in files:
        for step, seen in read_rank_samples(file).items():
            samples.setdefault(step, Counter()).update(seen)
    return samples


def read_rank_samples(path: Path) -> dict[int, list[tuple[Any, int]]]:
    """Id and content (crc32) of each sample, at each step of one rank.

    A step has several lines, one a micro-batch. After a resume steps come again; then the lines of
    the last start count.
    """
    from tetdist.errors import UserError

    steps: dict[int, list[tuple[Any, int]]] = {}
    last: int | None = None
    ids_of_step: set[Any] = set()
    data = path.read_bytes()
    # A last line without its end was torn by a kill.
    for number, raw in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = json.loads(raw)
            step, ids = line["step"], line["ids"]
            seen = list(zip(ids, line["crc32"], strict=True))
            whole = isinstance(step, int) and all(
                isinstance(id_, int | str) and isinstance(crc32, int) for id_, crc32 in seen
            )
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            shown = raw[:80].decode(errors="replace")
            raise UserError(f"{path}: line {number} is damaged: {shown}")
        # A step draws no sample twice. So a sample that comes again at the same step shows that a
        # new start began within the step at which the earlier one was killed.
        if step != last or not ids_of_step.isdisjoint(ids):
            steps[step], ids_of_step = [], set()
        steps[step] += seen
        ids_of_step.update(ids)
        last = step
    return steps


# --- several runs ---------------------------------------------------------------------------------


def overview(paths: list[Path], json_file: Path | None) -> None:
    from tetdist.apps.reports import runs_table

    records = read_records(paths)
    for table in runs_table.tables(records):
        print(aligned(table, right=tuple(range(1, len(table[0])))), end="\n\n")
    if json_file:
        write_json(json_file, runs_table.as_dict(records))


def require_plots() -> None:
    """See that matplotlib is there before the work, not after it.

    Raises:
        UserError: It is not installed.
    """
    from tetdist.apps.reports import style

    style.new_figure(1, 1)


def plot(paths: list[Path], out: Path, beside: str | None = None) -> None:
    """Draw the curves of runs, and the published one of that name beside them."""
    from tetdist.apps.reports import reference, runs_table
    from tetdist.storage.files import explaining

    records = read_records(paths)
    published = None
    if beside is not None:
        found = reference.find_reference(beside)
        if found.of_average:
            records = [record.of_average() for record in records]
        evaluated = [line["epoch"] for record in records for line in record.of_kind("val")]
        # No further than the runs are: the rest would press them into the first corner.
        published = (f"{beside} (published)", *reference.curve(found, max(evaluated, default=1.0)))
    with explaining(out):
        runs_table.plot(records, out, published)


def read_records(paths: list[Path]) -> "list[RunRecord]":
    """The runs as `runs_table` takes them.

    Raises:
        UserError: See `read_run`.
    """
    from tetdist.apps.reports.runs_table import RunRecord
    from tetdist.tracking.metrics_file import read_metrics

    folders = Counter(path.name for path in paths if path.is_dir())
    records = []
    for path in paths:
        run = read_run(path, effective=True)
        file = path / "metrics.jsonl" if path.is_dir() else path
        name = path.name if folders[path.name] == 1 else str(path)
        records.append(RunRecord(name, read_metrics(file), run.configuration))
    return records


# --- comparing ------------------------------------------------------------------------------------


def compare(a: ComparedRun, b: ComparedRun, tolerance: float) -> Comparison:
    configuration = None
    if a.configuration is not None and b.configuration is not None:
        configuration = [
            Pair(key, ours, theirs)
            for key, ours, theirs in side_by_side(a.configuration, b.configuration)
            if not equal(ours, theirs)
        ]
    samples = None
    if a.samples is not None and b.samples is not None:
        samples = compare_samples(a.samples, b.samples)
    metrics = compare_metrics(a.metrics, b.metrics, tolerance)
    return Comparison(a, b, tolerance, configuration, metrics, samples)


def side_by_side(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every key of either, in the order of the first, with both values."""
    return [(key, a.get(key, MISSING), b.get(key, MISSING)) for key in a | b]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


def relative_difference(a: Any, b: Any) -> float:
    """|a - b| over the larger of |a| and |b|: from 0 to 2.

    Infinity where they differ and are not both finite numbers.
    """
    if equal(a, b):
        return 0.0
    if not (is_finite(a) and is_finite(b)):
        return math.inf
    larger = max(abs(a), abs(b))
    difference = abs(a - b)
    # The difference of two huge numbers of different signs is more than a float holds.
    return difference / larger if is_finite(difference) else abs(a / larger - b / larger)


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def compare_metrics(a: Metrics, b: Metrics, tolerance: float) -> MetricsResult:
    results: dict[tuple[str, str], KeyResult] = {}
    first: tuple[int, str, list[Pair]] | None = None
    only: dict[str, tuple[list[int], list[int]]] = {}
    common = 0
    for kind in a | b:
        ours, theirs = a.get(kind, {}), b.get(kind, {})
        only[kind] = (sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys()))
        for step in sorted(ours.keys() & theirs.keys()):
            common += 1
            different: list[Pair] = []
            for key, x, y in side_by_side(ours[step], theirs[step]):
                relative = relative_difference(x, y)
                result = results.setdefault((kind, key), KeyResult(kind, key))
                result.common += 1
                if relative > result.largest:
                    result.largest, result.largest_at = relative, step
                if relative > tolerance:
                    different.append(Pair(key, x, y, relative))
                    result.different += 1
                    if result.first is None:
                        result.first = step
            # Two lines of the same step stand in the order in which they were written: train, val.
            if different and (first is None or step < first[0]):
                first = step, kind, different
    return MetricsResult(list(results.values()), first, only, common)


def compare_samples(a: Samples, b: Samples) -> SamplesResult:
    common = sorted(a.keys() & b.keys())
    different = [step for step in common if a[step] != b[step]]
    first_only: tuple[list[Any], list[Any]] = ([], [])
    content: list[Any] = []
    if different:
        ours, theirs = (Counter(ids_of(samples[different[0]])) for samples in (a, b))
        first_only = in_order((ours - theirs).elements()), in_order((theirs - ours).elements())
        changed = (a[different[0]] - b[different[0]]).keys()
        content = in_order({id_ for id_, _ in changed if ours[id_] == theirs[id_]})
    only = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    return SamplesResult(len(common), different, only, first_only, content)


def ids_of(seen: Counter[tuple[Any, int]]) -> list[Any]:
    return [id_ for id_, _ in seen.elements()]


def in_order(ids: Any) -> list[Any]:
    return sorted(ids, key=lambda id_: (isinstance(id_, str), id_))


# --- showing --------------------------------------------------------------------------------------


def report(comparison: Comparison) -> str:
    """The text that a person reads."""
    a, b = comparison.a, comparison.b
    width = max(len(str(run.path)) for run in (a, b))
    parts = [
        "\n".join(
            f"{name}  {run.path!s:{width}}  {extent(run.metrics)}"
            for name, run in (("a", a), ("b", b))
        )
    ]
    parts.append(report_configuration(comparison))
    parts += report_metrics(comparison)
    if comparison.samples is not None:
        parts.append(report_samples(comparison.samples))
    elif (a.samples is None) != (b.samples is None):
        which = "b" if a.samples is None else "a"
        parts.append(f"Samples: only {which} has a record of them; not compared.")
    within = f" within {comparison.tolerance:g}" if comparison.tolerance else ""
    parts.append(f"The runs are the same{within}." if comparison.same else "The runs differ.")
    return "\n\n".join(part for part in parts if part)


def extent(metrics: Metrics) -> str:
    if not metrics:
        return "no metrics"
    return "; ".join(
        f"{kind}: {count(len(steps), 'line')}, step {min(steps)}"
        + (f" to {max(steps)}" if len(steps) > 1 else "")
        for kind, steps in metrics.items()
    )


def report_configuration(comparison: Comparison) -> str:
    pairs = comparison.configuration
    if pairs is None:
        here = [run.configuration is not None for run in (comparison.a, comparison.b)]
        if not any(here):
            return ""
        return f"Configuration: only {'a' if here[0] else 'b'} has one; not compared."
    if not pairs:
        return "Configuration: the same."
    verb = "differs" if len(pairs) == 1 else "differ"
    rows = [("", "a", "b"), *((pair.key, plain(pair.a), plain(pair.b)) for pair in pairs)]
    return f"Configuration: {count(len(pairs), 'key')} {verb}.\n" + aligned(rows)


def report_metrics(comparison: Comparison) -> list[str]:
    metrics = comparison.metrics
    parts: list[str] = []
    if metrics.first is not None:
        step, kind, pairs = metrics.first
        rows = [("", "a", "b", "relative difference")]
        rows += [
            (f"{kind}/{pair.key}", plain(pair.a), plain(pair.b), f"{pair.relative:.2g}")
            for pair in pairs[:SHOWN]
        ]
        more = f"\n  and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        parts.append(f"Metrics: they part at step {step}.\n" + aligned(rows) + more)
    elif metrics.common:
        within = f" within {comparison.tolerance:g}" if comparison.tolerance else ""
        lines = count(metrics.common, "line")
        parts.append(f"Metrics: the same{within} in the {lines} that both have.")
    else:
        parts.append("Metrics: no step is in both.")

    moved = [result for result in metrics.keys if result.largest > 0]
    still = [f"{result.kind}/{result.key}" for result in metrics.keys if result.largest == 0]
    if moved:
        table = [("", "largest difference", "at step", "first at", "different at")]
        table += [
            (
                f"{result.kind}/{result.key}",
                f"{result.largest:.2g}",
                str(result.largest_at),
                "-" if result.first is None else str(result.first),
                f"{result.different} of {count(result.common, 'step')}",
            )
            for result in moved
        ]
        rest = ""
        if still:
            names = ", ".join(still[:SHOWN])
            more = f" and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
            rest = f"\n  the same to the bit: {names}{more}"
        parts.append("Over all steps that both have:\n" + aligned(table, right=(1, 2, 3)) + rest)

    extra = [
        (kind, f"only {name}", steps_text(steps))
        for kind, both in metrics.only.items()
        for name, steps in zip("ab", both, strict=True)
        if steps
    ]
    if extra:
        parts.append("Steps that only one has:\n" + aligned(extra))
    return parts


def report_samples(samples: SamplesResult) -> str:
    lines: list[str] = []
    if samples.different:
        first, number = samples.different[0], len(samples.different)
        lines.append(
            f"Samples: they part at step {first}, and differ at {number} of "
            f"{count(samples.common, 'step')}. At step {first}:"
        )
        for text, ids in (
            ("only a saw", samples.first_only[0]),
            ("only b saw", samples.first_only[1]),
            ("with other content", samples.first_content),
        ):
            if ids:
                more = ", ..." if len(ids) > SHOWN else ""
                shown = ", ".join(map(str, ids[:SHOWN]))
                lines.append(f"  {text}: {count(len(ids), 'sample')} ({shown}{more})")
    elif samples.common:
        lines.append(f"Samples: the same at {count(samples.common, 'step')}.")
    else:
        lines.append("Samples: no step is in both.")
    for name, steps in zip("ab", samples.only, strict=True):
        if steps:
            lines.append(f"  only {name} has a record of step {steps_text(steps)}")
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def plain(value: Any) -> str:
    """A value to the last bit; text without quotes."""
    return value if isinstance(value, str) else repr(value)


def steps_text(steps: list[int]) -> str:
    if len(steps) <= SHOWN:
        return ", ".join(map(str, steps))
    return f"{steps[0]}, {steps[1]}, ... {steps[-1]} ({counted(len(steps), 'step')})"


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison, ready for JSON."""
    metrics, samples = comparison.metrics, comparison.samples
    values: dict[str, Any] = {
        "a": str(comparison.a.path),
        "b": str(comparison.b.path),
        "tolerance": comparison.tolerance,
        "same": comparison.same,
        "configuration": None,
        "first": None,
        "keys": [vars(result) for result in metrics.keys],
        "only": {kind: {"a": a, "b": b} for kind, (a, b) in metrics.only.items()},
        "samples": None,
    }
    if comparison.configuration is not None:
        values["configuration"] = [pair.as_dict() for pair in comparison.configuration]
    if metrics.first is not None:
        step, kind, pairs = metrics.first
        values["first"] = {
            "step": step,
            "kind": kind,
            "values": [pair.as_dict() for pair in pairs],
        }
    if samples is not None:
        values["samples"] = {
            "common": samples.common,
            "different": samples.different,
            "only": {"a": samples.only[0], "b": samples.only[1]},
            "first": {
                "only": {"a": samples.first_only[0], "b": samples.first_only[1]},
                "content": samples.first_content,
            },
        }
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    from tetdist.storage.files import explaining, write_text
    from tetdist.tracking.metrics_file import strict

    # YAML knows dates, JSON does not.
    text = json.dumps(strict(values), indent=1, allow_nan=False, default=str)
    with explaining(path):
        write_text(path, text + "\n")
