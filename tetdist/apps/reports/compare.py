"""Differences of two runs: where their metrics first differ, by how much, and whether they saw the
same samples.

Both files of metrics are read in parallel, a step at a time, so long files take no memory.
"""

import heapq
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tetdist.errors import UserError
from tetdist.storage.files import parse_json
from tetdist.tables import aligned
from tetdist.tracking.metrics_file import each_line
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

_NOT_COMPARED = frozenset(("kind", "step", *OF_THE_CLOCK))
SHOWN = 8  # rows or items shown of a long list; --json has all
_MISSING = object()  # value of a key that one of the two runs lacks

# step -> number of times that all ranks together saw each (id, crc32)
Samples = dict[int, Counter[tuple[int, int]]]
Extent = dict[str, tuple[int, int, int]]


@dataclass
class KeyResult:
    """Differences of one key of one kind of lines, over the common steps."""

    kind: str
    key: str
    common: int = 0  # steps at which a run has the key
    different: int = 0  # those of them that differ by more than the tolerance
    first: int | None = None
    largest: float = 0.0
    largest_at: int | None = None


@dataclass
class MetricsResult:
    """Differences of two files of metrics."""

    keys: dict[str, dict[str, KeyResult]] = field(default_factory=dict)  # by kind
    # The first step at which a value differs, the kind of its line, and the differing values.
    first: dict[str, Any] | None = None
    only: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # steps, by kind and run
    common: int = 0  # common lines
    # Number of lines, first and last step, by kind, of a and of b.
    extents: tuple[Extent, Extent] = field(default_factory=lambda: ({}, {}))


# --- reading --------------------------------------------------------------------------------------


@contextmanager
def reading() -> Iterator[None]:
    """Turn an OSError while reading a run into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or 'the run'}: {error.strerror}") from error


def open_run(path: Path, *, effective: bool = False) -> tuple[Path, dict[str, Any] | None]:
    """Find a run's metrics.jsonl, and read its configuration, if it has one, with dotted keys.

    If ``effective``, keys of the configuration that have no effect are left out.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a run folder or a metrics.jsonl")
    if not path.is_dir():
        return path, None
    if not (path / "metrics.jsonl").exists():
        raise UserError(f"{path} is not a run folder, because it has no metrics.jsonl")
    return path / "metrics.jsonl", _read_configuration(path / "config.yaml", effective)


def _read_configuration(path: Path, effective: bool) -> dict[str, Any] | None:
    from tetdist.config import checks, identity, loading
    from tetdist.config.yaml_files import read_yaml

    if not path.exists():
        return None
    try:
        values = read_yaml(path)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); restore it") from error
    # A key that an older version did not know gets its default. A configuration that cannot be
    # parsed is used as it is.
    with suppress(UserError):
        parsed = loading.parse(values, str(path), warn=False)
        return checks.effective(parsed) if effective else identity.flatten(parsed.as_dict())
    return identity.flatten(values)


def _ascending(path: Path, side: int) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield step, side and line of each line."""
    before, kinds = -1, set[str]()
    for line in each_line(path):
        step, kind = line["step"], line["kind"]
        if step > before:
            kinds.clear()
        if step < before or kind in kinds:
            raise UserError(
                f"{path}: step {step} of {kind} follows step {before}, but steps must ascend; "
                "remove lines of other runs"
            )
        before = step
        kinds.add(kind)
        yield step, side, line


def _side_by_side(a: Path, b: Path) -> Iterator[tuple[int, str, list[dict[str, Any] | None]]]:
    """Yield step, kind and the two runs' lines; None for a run without such a line."""
    merged = heapq.merge(_ascending(a, 0), _ascending(b, 1), key=lambda one: one[0])
    for step, lines in itertools.groupby(merged, key=lambda one: one[0]):
        kinds: dict[str, list[dict[str, Any] | None]] = {}
        for _, side, line in lines:
            kinds.setdefault(line["kind"], [None, None])[side] = line
        for kind, both in kinds.items():
            yield step, kind, both


def _values_of(line: dict[str, Any]) -> dict[str, Any]:
    """Flatten a line: entries of a dict become key.entry, those of a list key.t1, key.t2, ..."""
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
        if key not in _NOT_COMPARED:
            add(key, value)
    return values


def _read_samples(folder: Path) -> Samples | None:
    """Return the samples that all ranks saw at each step; None if the run recorded none."""
    samples: Samples = {}
    files = [
        file
        for file in sorted(folder.glob("samples-*.jsonl"))
        if re.fullmatch(r"samples-\d+\.jsonl", file.name)
    ]
    for file in files:
        for step, seen in _read_rank_samples(file).items():
            samples.setdefault(step, Counter()).update(seen)
    return samples if files else None


def _read_rank_samples(path: Path) -> dict[int, list[tuple[int, int]]]:
    """Return id and content (crc32) of each sample, by step, of one rank.

    A step has several lines, one for each micro-batch. A resumed run repeats steps; then the lines
    of the last start count.
    """
    steps: dict[int, list[tuple[int, int]]] = {}
    last: int | None = None
    ids_of_step: set[int] = set()
    data = path.read_bytes()
    # Ignore a last line without its end, which a kill tore.
    for number, raw in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = parse_json(raw)
            step, ids = line["step"], line["ids"]
            seen = list(zip(ids, line["crc32"], strict=True))
            whole = isinstance(step, int) and all(
                isinstance(value, int) for sample in seen for value in sample
            )
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            shown = raw[:80].decode(errors="replace")
            raise UserError(f"{path}: line {number} is damaged ({shown}); restore the file")
        # A step draws no sample twice. So if a sample repeats within a step, a new start began at
        # the step at which the earlier one was killed.
        if step != last or not ids_of_step.isdisjoint(ids):
            steps[step], ids_of_step = [], set()
        steps[step] += seen
        ids_of_step.update(ids)
        last = step
    return steps


# --- comparing ------------------------------------------------------------------------------------


def compare(a: Path, b: Path, tolerance: float) -> tuple[dict[str, Any], str]:
    """Return the differences of two runs, ready for JSON, and a text to print.

    Values up to the relative difference ``tolerance`` apart count as the same.
    """
    with reading():
        (file_a, config_a), (file_b, config_b) = open_run(a), open_run(b)
        pairs, of_configuration = compare_configurations(config_a, config_b)
        samples, of_samples = compare_samples(_read_samples(a), _read_samples(b))
        metrics = compare_metrics(file_a, file_b, tolerance)
    alone = [steps for sides in metrics.only.values() for steps in sides.values()]
    if samples is not None:
        alone += [samples["different"], *samples["only"].values()]
    found = {
        "a": str(a),
        "b": str(b),
        "tolerance": tolerance,
        "same": metrics.first is None and not any(alone),
        "configuration": pairs,
        "first": metrics.first,
        "keys": [vars(one) for results in metrics.keys.values() for one in results.values()],
        "only": metrics.only,
        "samples": samples,
    }
    width = max(len(str(path)) for path in (a, b))
    within = f" within {tolerance:g}" if tolerance else ""
    parts = [
        f"a  {a!s:{width}}  {_extent(metrics.extents[0])}\n"
        f"b  {b!s:{width}}  {_extent(metrics.extents[1])}",
        of_configuration,
        *_report(metrics, within),
        of_samples,
        f"The runs are the same{within}." if found["same"] else "The runs differ.",
    ]
    return found, "\n\n".join(part for part in parts if part)


def compare_configurations(
    a: dict[str, Any] | None, b: dict[str, Any] | None
) -> tuple[list[dict[str, Any]] | None, str]:
    """Return the keys that differ, and a text; None if a run has no configuration."""
    if a is None or b is None:
        which = "b" if a is None else "a"
        return None, "" if a is b else f"Configuration: only {which} has one; not compared."
    pairs = [
        _pair(key, a, b) for key in a | b if not _equal(a.get(key, _MISSING), b.get(key, _MISSING))
    ]
    if not pairs:
        return [], "Configuration: the same."
    verb = "differs" if len(pairs) == 1 else "differ"
    rows = [["", "a", "b"], *([pair["key"], *_both(pair)] for pair in pairs)]
    return pairs, f"Configuration: {counted(len(pairs), 'key')} {verb}.\n" + aligned(rows)


def _pair(key: str, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Return a key's two values; a missing one is left out."""
    return {"key": key, **{name: one[key] for name, one in (("a", a), ("b", b)) if key in one}}


def _both(pair: dict[str, Any]) -> list[str]:
    """Return the two values with all digits, text without quotes."""
    values = (pair.get(name, _MISSING) for name in "ab")
    return [
        "-" if value is _MISSING else value if isinstance(value, str) else repr(value)
        for value in values
    ]


def _equal(a: Any, b: Any) -> bool:
    return bool(a == b) or (a != a and b != b)


def relative_difference(a: Any, b: Any) -> float:
    """Return |a - b| divided by the larger of |a| and |b|: from 0 to 2.

    Infinity if they differ and are not both finite numbers.
    """
    if _equal(a, b):
        return 0.0
    if not all(isinstance(x, int | float) and abs(x) <= sys.float_info.max for x in (a, b)):
        return math.inf
    difference, larger = abs(a - b), max(abs(a), abs(b))
    # The difference of two huge numbers of different signs can overflow a float.
    return difference / larger if difference < math.inf else abs(a / larger - b / larger)


def compare_metrics(a: Path, b: Path, tolerance: float) -> MetricsResult:
    """Compare two files of metrics, which are read once and in parallel."""
    found = MetricsResult()
    for step, kind, both in _side_by_side(a, b):
        alone = found.only.setdefault(kind, {"a": [], "b": []})
        for extent, line in zip(found.extents, both, strict=True):
            if line is not None:
                number, first, _ = extent.get(kind, (0, step, step))
                extent[kind] = number + 1, first, step
        a_line, b_line = both
        if a_line is None or b_line is None:
            alone["b" if a_line is None else "a"].append(step)
            continue
        found.common += 1
        different = []
        ours, theirs = _values_of(a_line), _values_of(b_line)
        results = found.keys.setdefault(kind, {})
        for key in ours | theirs:
            if (result := results.get(key)) is None:
                result = results[key] = KeyResult(kind, key)
            result.common += 1
            relative = relative_difference(ours.get(key, _MISSING), theirs.get(key, _MISSING))
            if relative == 0:
                continue
            if relative > result.largest:
                result.largest, result.largest_at = relative, step
            if relative > tolerance:
                if found.first is None:
                    different.append(_pair(key, ours, theirs) | {"relative": relative})
                result.different += 1
                if result.first is None:
                    result.first = step
        if different:
            found.first = {"step": step, "kind": kind, "values": different}
    return found


def compare_samples(a: Samples | None, b: Samples | None) -> tuple[dict[str, Any] | None, str]:
    """Return the steps with different samples, and a text; None if a run recorded no samples.

    ``first`` describes the first of these steps: ids that only a or only b has (with repetitions),
    and common ids with different content.
    """
    if a is None or b is None:
        which = "b" if a is None else "a"
        return None, "" if a is b else f"Samples: only {which} recorded them; not compared."
    common = sorted(a.keys() & b.keys())
    different = [step for step in common if a[step] != b[step]]
    only = {"a": sorted(a.keys() - b.keys()), "b": sorted(b.keys() - a.keys())}
    ids: dict[str, list[int]] = {"a": [], "b": [], "content": []}
    if different:
        step = different[0]
        ours, theirs = (Counter(id_ for id_, _ in one[step].elements()) for one in (a, b))
        ids["a"] = sorted((ours - theirs).elements())
        ids["b"] = sorted((theirs - ours).elements())
        changed = {id_ for id_, _ in a[step] - b[step]}
        ids["content"] = sorted(id_ for id_ in changed if ours[id_] == theirs[id_])
        lines = [
            f"Samples: they first differ at step {step}, in total at {len(different)} of "
            f"{counted(len(common), 'step')}. At step {step}:"
        ]
    elif common:
        lines = [f"Samples: the same at {counted(len(common), 'step')}."]
    else:
        lines = ["Samples: the runs have no common step."]
    headings = {"a": "only in a", "b": "only in b", "content": "with different content"}
    for name in (name for name in headings if ids[name]):
        more = ", ..." if len(ids[name]) > SHOWN else ""
        shown = ", ".join(map(str, ids[name][:SHOWN]))
        lines.append(f"  {headings[name]}: {counted(len(ids[name]), 'sample')} ({shown}{more})")
    lines += [
        f"  only {name} recorded step {_steps(steps)}" for name, steps in only.items() if steps
    ]
    found = {
        "common": len(common),
        "different": different,
        "only": only,
        "first": {"only": {"a": ids["a"], "b": ids["b"]}, "content": ids["content"]},
    }
    return found, "\n".join(lines)


# --- showing --------------------------------------------------------------------------------------


def _extent(kinds: Extent) -> str:
    texts = [
        f"{kind}: {counted(number, 'line')}, step {first}" + (f" to {last}" if number > 1 else "")
        for kind, (number, first, last) in kinds.items()
    ]
    return "; ".join(texts) or "no metrics"


def _report(metrics: MetricsResult, within: str) -> list[str]:
    parts: list[str] = []
    if metrics.first is not None:
        step, kind, pairs = metrics.first.values()
        rows = [["", "a", "b", "relative difference"]]
        rows += [
            [f"{kind}/{pair['key']}", *_both(pair), f"{pair['relative']:.2g}"]
            for pair in pairs[:SHOWN]
        ]
        more = f"\n  and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
        parts.append(f"Metrics: they first differ at step {step}.\n" + aligned(rows) + more)
    elif metrics.common:
        lines = counted(metrics.common, "line")
        parts.append(f"Metrics: the same{within} in {lines} that both have.")
    else:
        parts.append("Metrics: the runs have no common step.")

    results = {
        f"{kind}/{key}": result
        for kind, of_kind in metrics.keys.items()
        for key, result in of_kind.items()
    }
    table = [
        [
            name,
            f"{result.largest:.2g}",
            str(result.largest_at),
            "-" if result.first is None else str(result.first),
            f"{result.different} of {counted(result.common, 'step')}",
        ]
        for name, result in results.items()
        if result.largest > 0
    ]
    still = [name for name, result in results.items() if result.largest == 0]
    if table:
        head = ["", "largest difference", "at step", "first at", "different at"]
        more = f" and {len(still) - SHOWN} more" if len(still) > SHOWN else ""
        rest = f"\n  bitwise identical: {', '.join(still[:SHOWN])}{more}" if still else ""
        shown = aligned([head, *table], right=(1, 2, 3))
        parts.append(f"Over all common steps:\n{shown}{rest}")

    extra = [
        [kind, f"only {name}", _steps(steps)]
        for kind, both in metrics.only.items()
        for name, steps in both.items()
        if steps
    ]
    if extra:
        parts.append("Steps in one run only:\n" + aligned(extra))
    return parts


def _steps(steps: list[int]) -> str:
    if len(steps) <= SHOWN:
        return ", ".join(map(str, steps))
    return f"{steps[0]}, {steps[1]}, ... {steps[-1]} ({counted(len(steps), 'step')})"
