"""Convert recordings of event cameras to tensors to train on.

    python tools/prebin_dvs.py /data/nmnist data/nmnist --preset nmnist
    python tetdist/train.py --config nmnist.yaml data.root=data/nmnist/splits/published

docs/events.md has the formats, layouts, parameters and splits. The same command continues when
stopped. Exit status: 0 done, 2 nothing to train on was written, 130 stopped.
"""

import argparse
import os
import re
import sys
from functools import partial
from pathlib import Path

# Each worker multiplies small matrices, for which numpy's threads cost a hundred times their gain.
# numpy reads this variable at import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tetdist.apps.cli.common import documented_parser, report_bad, run_command
from tetdist.apps.events import splits
from tetdist.apps.events.binning import Binning, Window
from tetdist.apps.events.folders import Listing, list_sources
from tetdist.apps.events.formats import SUFFIXES
from tetdist.apps.events.presets import PRESETS, check_source, expectation
from tetdist.apps.events.recording import Sensor
from tetdist.apps.events.simulate import (
    DEFAULT_SENSOR,
    IMAGE_SUFFIXES,
    SMALLEST_SENSOR,
    Simulation,
)
from tetdist.apps.events.split_roots import make_split
from tetdist.apps.events.statistics import statistics, table
from tetdist.apps.events.tensors import Record, Settings, make_tensors, open_destination
from tetdist.apps.file_progress import file_progress
from tetdist.config.flags import MOST_PIXELS, MOST_THREADS, MOST_TIMESTEPS, positive
from tetdist.datasets.recorded_split import description
from tetdist.errors import UserError, typed
from tetdist.storage.files import explaining, write_json

_SENSORS = {"dvs128": "128x128", "davis240": "240x180"}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    return run_command(lambda: _prebin(options), interrupted="stopped; the same command continues")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = documented_parser("prebin_dvs", __doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=Path, help="folder of the recordings")
    add("dest", metavar="DEST", type=Path, help="folder of the tensors")
    add(
        "--preset",
        choices=list(PRESETS),
        help="a published data set: sets --timesteps, --size, --bins, --values, --sensor and"
        " --split where they are not given",
    )
    add(
        "--timesteps",
        metavar="T",
        type=partial(positive, most=MOST_TIMESTEPS),
        help="number of time bins; required without --preset",
    )
    add("--size", metavar="N|WxH", type=_size, help="size of the frames; default: the sensor's")
    add(
        "--bins",
        metavar="count|time|20ms|2000events",
        type=_bins,
        help="T bins of equal event count, or of equal duration; or windows of a fixed size, as a"
        " live camera delivers them; default: count",
    )
    add(
        "--values",
        choices=["count", "occupancy", "normalised", "published"],
        help="pixel values: number of events; 1 if there are any; divided by the frame's maximum;"
        " or as in the TET paper's published code; default: count",
    )
    add(
        "--resize",
        choices=["area", "bilinear"],
        help="default: area; bilinear with --values published",
    )
    add(
        "--dtype",
        choices=["uint8", "float16"],
        help="default: uint8 for --values count, else float16",
    )
    add("--sensor", metavar="NAME|WxH", type=_sensor, help=f"{', '.join(_SENSORS)} or WxH")
    add(
        "--split",
        metavar="NAME[,NAME]",
        help="published, first-90-percent, first-80-percent, first-70-percent,"
        " first-90-percent-by-letters, 0-99-test, stratified-9-1, or all-to-val, to evaluate only;"
        " default: published if the source has it, all-to-val if it has a test part only, else"
        " stratified-9-1",
    )
    add("--seed", type=_seed, default=0, help="seed of stratified-9-1 and --simulate; default: 0")
    add("--simulate", action="store_true", help="simulate an event camera from images in SOURCE")
    cores = len(os.sched_getaffinity(0))
    workers = partial(positive, most=MOST_THREADS)
    add("--workers", metavar="N", type=workers, default=cores, help="default: %(default)s")
    add("--skip-bad", action="store_true", help="leave out recordings that cannot be used")
    add("--overwrite", action="store_true", help="remove this tool's files in DEST and start over")
    options = parser.parse_args(arguments)
    if options.preset and options.simulate:
        parser.error("--preset needs recordings and --simulate images; leave one out")
    preset = PRESETS[options.preset].options() if options.preset else {}
    options.by_preset = {name: preset[name] for name in preset if vars(options)[name] is None}
    vars(options).update(options.by_preset)
    options.bins, options.values = options.bins or "count", options.values or "count"
    if options.timesteps is None:
        parser.error("give --timesteps (the number of time bins) or --preset")
    if options.dtype is None:
        options.dtype = "uint8" if options.values == "count" else "float16"
    if options.values == "published" and options.resize == "area":
        parser.error("--values published always resizes bilinearly; leave out --resize area")
    if options.resize is None:
        options.resize = "bilinear" if options.values == "published" else "area"
    return options


def _bins(text: str) -> str:
    if text not in ("count", "time") and Window.of(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be count, time, a duration such as 20ms or 500us, or a number of events"
            " such as 2000events"
        )
    return text


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer, 0 or above")
    return int(text)


def _size(text: str) -> Sensor:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 48 or 64x48")
    width, height = int(match[1]), int(match[2] or match[1])
    if max(width, height) > MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} must be at most {MOST_PIXELS} pixels a side")
    return Sensor(width, height)


def _sensor(text: str) -> Sensor:
    return _size(_SENSORS.get(text.lower(), text))


def _prebin(options: argparse.Namespace) -> None:
    settings = _settings(options)
    listing = _listing(options)
    if listing.passed_over:
        print(f"ignored {listing.passed_over}", file=sys.stderr)
    if options.preset:
        _check_preset(options, listing)
    names = options.split.split(",") if options.split else [splits.default_split(listing.sources)]
    names = _possible_splits(options, listing, names)
    with open_destination(options.dest, options.source, settings, overwrite=options.overwrite):
        records, bad = make_tensors(
            options.source, options.dest, listing, settings, options.workers, file_progress
        )
        if len(bad) > 1 and not records and len({one.reason for one in bad}) == 1:
            every = f"each of {len(bad):,} recordings is bad: {bad[0].reason}"
            raise UserError(f"no split was made: {every}")
        report_bad(bad, "recording", len(bad) + len(records))
        if not records:
            raise UserError("no split was made: no recording can be used (see above)")
        if bad and not options.skip_bad:
            raise UserError("no split was made: replace the bad recordings, or give --skip-bad")
        counts = statistics(records.values())
        file = options.dest / "statistics.json"
        with explaining(file):
            write_json(file, counts)
        print(table(counts))
        if saturated := counts["all"]["saturated"]:
            print(
                f"{saturated} values were clipped to the maximum of {options.dtype}; use more"
                " --timesteps, a larger --size or --dtype float16",
                file=sys.stderr,
            )
        for name in names:
            _make_split(options, listing, records, settings, name, len(bad))


def _settings(options: argparse.Namespace) -> Settings:
    binning = Binning(
        timesteps=options.timesteps,
        size=options.size,
        bins=options.bins,
        values=options.values,
        resize=options.resize,
        dtype=options.dtype,
    )
    if not options.simulate:
        return Settings(binning, options.sensor)
    width, height = options.sensor or DEFAULT_SENSOR
    if min(width, height) < SMALLEST_SENSOR:
        raise UserError(
            f"--sensor: --simulate needs at least {SMALLEST_SENSOR}x{SMALLEST_SENSOR} pixels, not "
            f"{width}x{height}"
        )
    return Settings(binning, None, Simulation(width, height, options.seed))


def _listing(options: argparse.Namespace) -> Listing:
    try:
        return list_sources(options.source, IMAGE_SUFFIXES if options.simulate else SUFFIXES)
    except UserError as error:
        if options.preset is None:
            raise
        raise UserError(f"{error}; {expectation(options.preset)}") from error


def _check_preset(options: argparse.Namespace, listing: Listing) -> None:
    """Check that the source is the preset's data set; print what the preset sets."""
    warning = check_source(options.preset, options.source, listing.sources)
    kept = [f"--{name} {value}" for name, value in options.by_preset.items()]
    print(f"--preset {options.preset}: {' '.join(kept) or 'all overridden'}", file=sys.stderr)
    if warning:
        print(warning, file=sys.stderr)


def _possible_splits(options: argparse.Namespace, listing: Listing, names: list[str]) -> list[str]:
    """Check that the splits are possible, before any tensor is made; return their names.

    A preset's splits that an incomplete data set cannot have are left out, with a message.
    """

    possible = list[str]()
    for name in names:
        if name not in splits.NAMES:
            raise UserError(f"--split: {name!r} is not one of {', '.join(splits.NAMES)}")
        try:
            splits.assign(listing.sources, name, options.seed)
        except UserError as error:
            none_is_left = name == names[-1] and not possible
            if "split" not in options.by_preset or none_is_left:
                bad = [(one.path, one.problem) for one in listing.sources if one.problem]
                report_bad(bad, "recording", len(listing.sources))
                raise
            print(f"split skipped: {error}", file=sys.stderr)
        else:
            possible.append(name)
    return possible


def _make_split(
    options: argparse.Namespace,
    listing: Listing,
    records: dict[str, Record],
    settings: Settings,
    name: str,
    bad: int,
) -> None:
    root = make_split(
        options.dest,
        listing.sources,
        records,
        settings,
        name=name,
        seed=options.seed,
        bad=bad,
        workers=options.workers,
    )
    described = description(root)
    assert described is not None
    numbers = described["recordings"]
    made = "simulated from images, " if options.simulate else ""
    if name == splits.ALL_TO_VAL:
        command = f"{typed('eval')} RUN --data {root}"
        print(f"{root}: {made}{numbers['val']} to test; {command}")
        return
    print(f"{root}: {made}{numbers['train']} to train, {numbers['val']} to test; data.root={root}")
    if options.preset:
        unknown = "no published result is known for this split"
        behind = PRESETS[options.preset].splits.get(name)
        print(f"  of the whole data set, used by: {behind}" if behind else f"  {unknown}")
