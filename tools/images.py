"""Prepare data for training: `python tools/images.py index ROOT` verifies and indexes it."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tetdist.data.index import BadFile, Index

# tetdist is imported where it is used: worker processes run this file's top again, and a missing
# package must end in a sentence.

_INSTALL = "pip install 'tetdist[train]'"
_SECONDS_BETWEEN_LINES = 10.0


def main() -> int:
    args = _parse()
    try:
        return _run(args)
    except ModuleNotFoundError as e:
        source = "`pip install -e .` in its folder" if e.name == "tetdist" else _INSTALL
        print(f"error: {e.name} is not installed: {source}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; no index was written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from tetdist.errors import UserError

    try:
        return _index(args)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "index",
        help="verify every file of a data set and write its index",
        description="Verify every file ROOT/SPLIT/CLASS/FILE and write DIR/SPLIT.npz, from which"
        " training reads. Exit status: 0 written, 2 nothing written, 130 stopped.",
    )
    cores = len(os.sched_getaffinity(0))
    add = command.add_argument
    add("root", metavar="ROOT", type=Path, help="the data root")
    add("--out", metavar="DIR", type=Path, help="default: ROOT/index")
    add("--splits", default="train,val", help="default: %(default)s")
    add("--workers", metavar="N", type=int, default=cores, help="processes; default: %(default)s")
    add("--events", action="store_true", help="not images but .npy tensors of shape (T, 2, H, W)")
    add(
        "--no-decode",
        action="store_true",
        help="read only the images' headers: quick, but damage will show in training",
    )
    add("--skip-bad", action="store_true", help="leave out the files that cannot be used")
    args = parser.parse_args()
    args.splits = [split for split in args.splits.split(",") if split]
    if not args.splits:
        command.error("--splits names no split")
    if args.workers < 1:
        command.error("--workers must be at least 1")
    if args.events and args.no_decode:
        command.error("--no-decode has no effect with --events")
    return args


def _index(args: argparse.Namespace) -> int:
    """Index every split, then write all the indexes or none."""
    from tetdist.data.index import (
        build_event_index,
        build_index,
        index_file,
        list_classes,
        save_index,
    )
    from tetdist.data.sources import check_same_classes
    from tetdist.errors import UserError

    # What half an hour of decoding must not come before.
    out = args.out or args.root / "index"
    nearest = next(path for path in (out, *out.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"{out} cannot be written: name another folder with --out")
    check_same_classes({split: list_classes(args.root, split) for split in args.splits})
    indexes: list[Index] = []
    bad: list[BadFile] = []
    for split in args.splits:
        with _Progress(split) as progress:
            if args.events:
                result = build_event_index(args.root, split, args.workers, progress)
            else:
                decode = not args.no_decode
                result = build_index(args.root, split, args.workers, decode, progress)
        indexes.append(result[0])
        bad.extend(result[1])

    for path, reason in bad:
        print(f"bad: {path}: {reason}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} of {len(bad) + sum(map(len, indexes))} files are bad", file=sys.stderr)
    if bad and not args.skip_bad:
        raise UserError("no index was written: mend the bad files, or give --skip-bad")
    for index in indexes:
        missing = set(range(len(index.classes))) - set(index.labels.tolist())
        if missing:
            name = index.classes[min(missing)]
            raise UserError(f"no index was written: class {name!r} of {index.split} is all bad")
    for index in indexes:
        file = index_file(out, index.split)
        save_index(index, file)
        skipped = f", {len(index.skipped)} bad ones left out" if index.skipped else ""
        print(f"{file}: {len(index)} {index.kind} in {len(index.classes)} classes{skipped}")
    return 0


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, split: str) -> None:
        self._split = split
        self._bar: Any = None
        self._start = time.monotonic()
        self._last_line = self._start

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=self._split, unit="file", smoothing=0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if done == total or now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            rate = done / max(now - self._start, 1e-6)
            left = (total - done) / rate
            print(
                f"{self._split}: {done}/{total} files, {rate:.0f} files/s, {left:.0f} s left",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
