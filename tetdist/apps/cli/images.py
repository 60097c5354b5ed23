"""Prepare images for training: index, check, shard. docs/data.md has the layouts."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetdist.apps.cli.common import program, report_bad, run_command, write_result
from tetdist.apps.file_progress import file_progress
from tetdist.config.flags import MOST_THREADS, Parser, positive
from tetdist.datasets.class_folders import check_root
from tetdist.datasets.layouts import (
    Listing,
    check_same_classes,
    check_splits,
    default_splits,
    in_tars,
    list_split,
)
from tetdist.errors import UserError, typed
from tetdist.storage.files import check_writable
from tetdist.wording import counted

if TYPE_CHECKING:
    from tetdist.apps.images.check import Finding
    from tetdist.datasets.index import BadFile, Index


_PRINTED_FINDINGS = 20


def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    return run_command(lambda: args.run(args), interrupted=f"stopped; {args.when_stopped}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=program("images"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    index = commands.add_parser(
        "index",
        help="verify every file of a data set and write its index",
        description="Verify every image of ROOT (class folders, WebDataset shards or the official"
        " tars) and write the index DIR/SPLIT.npz, which training reads. Exit status: 0 written, 2"
        " nothing written, 130 stopped.",
    )
    index.set_defaults(run=_index, when_stopped="no index was written; the same command continues")
    check = commands.add_parser(
        "check",
        help="find damage, duplicates, wrong names and missing files",
        description="Decode and hash every image of ROOT; list images that do not decode, are"
        " duplicates, contradict their label or are missing from ImageNet-1k; compare with the"
        " index. Exit status: 0 good, 1 problems found, 2 not checked, 130 stopped.",
    )
    check.set_defaults(run=_check, when_stopped="nothing was changed")
    shard = commands.add_parser(
        "shard",
        help="pack an indexed data set, or Parquet files, into WebDataset shards",
        description="Pack the indexed images of ROOT, in random order, into"
        " DEST/SPLIT/SPLIT-000000.tar and so on, and write their index. With --from-parquet, ROOT"
        " holds Parquet files, and needs no index. The same command continues when stopped. Exit"
        " status: 0 done, 2 not done, 130 stopped.",
    )
    shard.set_defaults(run=_shard, when_stopped="the same command continues")

    for command in (index, check, shard):
        add = command.add_argument
        add("root", metavar="ROOT", type=Path, help="folder of train/ and val/")
        add("--splits", help="default: train,val; without a train split, every evaluation split")
        cores, workers = len(os.sched_getaffinity(0)), partial(positive, most=MOST_THREADS)
        text = "processes; default: %(default)s"
        add("--workers", metavar="N", type=workers, default=cores, help=text)
    for command in (index, check):
        add = command.add_argument
        add("--out", metavar="DIR", type=Path, help="folder of the index; default: ROOT/index")
        text = "class names of the shards' labels, one a line, or imagenet-1k; default:"
        add("--classes", metavar="FILE", help=f"{text} ROOT/classes.txt, else the label numbers")
    add = index.add_argument
    add("--events", action="store_true", help="index .npy tensors of shape (T, 2, H, W)")
    text = "check only the headers of images: quick, but misses damage that stops a training"
    add("--no-decode", action="store_true", help=text)
    add("--skip-bad", action="store_true", help="leave out files that cannot be used")
    add = check.add_argument
    add("--json", metavar="FILE", type=Path, help="write all findings as JSON")
    text = "do not compare with ImageNet-1k: ROOT has fewer or other WordNet classes"
    add("--subset", action="store_true", help=text)
    add = shard.add_argument
    add("dest", metavar="DEST", type=Path, help="the new data root")
    add("--index", metavar="DIR", type=Path, help="default: ROOT/index")
    text = "shard size; default: %(default)s MB"
    add("--shard-mb", metavar="N", type=positive, default=256, help=text)
    add("--seed", metavar="N", type=int, default=0, help="seed of the order; default: %(default)s")
    text = "pack the Parquet files in ROOT or ROOT/data, such as the Hugging Face hub's ImageNet:"
    add("--from-parquet", action="store_true", help=f"{text} one shard for each, in its order")
    text = "pack a part of ImageNet-1k, or its images with other labels (--from-parquet)"
    add("--subset", action="store_true", help=text)
    args = parser.parse_args(arguments)
    if args.splits is not None:
        args.splits = [split for split in args.splits.split(",") if split]
    return args


def _index(args: argparse.Namespace) -> int:
    """Index every split, then write all indexes or none."""
    from tetdist.datasets.index import index_file, index_listing, save_index, without_validation

    check_root(args.root)
    if args.splits is not None:
        check_splits(args.root, args.splits)
    # Check first, because otherwise half an hour of decoding could be lost.
    out = args.out or args.root / "index"
    _check_writable(out, "--out")
    indexes: list[Index] = []
    bad: list[BadFile] = []
    listings = _list(args, "events" if args.events else "images")
    for listing in listings:
        journal = index_file(out, listing.split).with_suffix(".journal")
        with file_progress(listing.split) as progress:
            decode = not args.no_decode
            result = index_listing(args.root, listing, args.workers, decode, progress, journal)
        indexes.append(result[0])
        bad.extend(result[1])

    for listing in listings:
        if listing.passed_over:
            print(f"{listing.split}: ignored {listing.passed_over}", file=sys.stderr)
    # A class folder without images is bad, too, and no file.
    kind = "path" if any(one.bad and not one.archives for one in listings) else "file"
    report_bad(bad, kind, len(bad) + sum(map(len, indexes)))
    if bad and not args.skip_bad:
        raise UserError("no index was written: replace or remove what is bad, or give --skip-bad")
    for index, listing in zip(indexes, listings, strict=True):
        labels = listing.labels if listing.archives else range(len(listing.classes))
        missing = set(labels) - set(index.labels.tolist())
        if missing:
            name = index.classes[min(missing)]
            raise UserError(
                f"no index was written: {index.split} has no usable file of {name!r}; add some or "
                "remove the class"
            )
    for index in indexes:
        file = index_file(out, index.split)
        save_index(index, file)
        file.with_suffix(".journal").unlink(missing_ok=True)
        print(f"{file}: {_described(index)}")
    if [index.split for index in indexes] == ["train"]:
        print(without_validation(args.root))
    if all(index.split != "train" for index in indexes):
        where = ["--index", args.out] if args.out else []
        command = typed("eval", "RUN", "--data", args.root, *where, "--split", indexes[0].split)
        print(f"without a train split, evaluate with: {command}")
    elif args.out:
        print(f"train with data.index={args.out}")
    return 0


def _check_writable(folder: Path, option: str) -> None:
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise UserError(f"{folder} is not writable; name another folder with {option}")


def _described(index: "Index") -> str:
    empty = len(index.classes) - len(set(index.labels.tolist()))
    places = f" in {counted(len(index.archives), 'tar file')}" if index.archives else ""
    without = f", {empty} of them empty" if empty else ""
    skipped = f", {counted(len(index.skipped), 'bad one')} left out" if index.skipped else ""
    samples = counted(len(index), {"images": "image", "events": "tensor"}[index.kind])
    what = f"{samples}{places} in {counted(len(index.classes), 'class')}"
    return f"{what}{without}{skipped}"


def _list(args: argparse.Namespace, kind: Any = "images") -> list[Listing]:
    """List every split and check that labels mean the same classes in all of them."""
    listings = []
    for split in args.splits or default_splits(args.root):
        unit = "tar" if in_tars(args.root, split, kind) else "folder"
        with file_progress(f"{split}: listing", unit) as progress:
            listing = list_split(args.root, split, kind, args.workers, args.classes, progress)
            listings.append(listing)
    bad = {file.path for one in listings for file in one.bad}  # with empty class folders
    check_same_classes(
        {
            one.split: tuple(name for name in one.classes if f"{one.split}/{name}" not in bad)
            for one in listings
        }
    )
    return listings


def _check(args: argparse.Namespace) -> int:
    """Examine every split, then compare them with each other, with ImageNet and the index."""
    from tetdist.apps.images import check

    if args.json:
        check_writable("--json", args.json)
    examined: dict[str, tuple[Listing, list[bytes | str]]] = {}
    findings: list[Finding] = []
    for listing in _list(args):
        with file_progress(listing.split) as progress:
            samples = check.examine_split(args.root, listing, args.workers, progress)
        examined[listing.split] = listing, samples
        findings.extend(check.split_findings(listing, samples))
        if not args.subset:
            findings.extend(check.imagenet_findings(listing))
        out = args.out or args.root / "index"
        findings.extend(check.index_findings(args.root, out, listing.split))
        if listing.passed_over:
            print(f"{listing.split}: ignored {listing.passed_over}", file=sys.stderr)
    findings.extend(check.duplicate_findings(examined))

    _print_findings(findings, args.json)
    for split, (listing, _) in examined.items():
        number, classes = len(listing.labels), len(listing.classes)
        print(f"{split}: {counted(number, 'image')} in {counted(classes, 'class')} examined")
    problems = sum(finding.kind != "duplicate" for finding in findings)
    repeated = counted(len(findings) - problems, "duplicate")
    kinds = {finding.kind for finding in findings}
    hint = "; for a part of ImageNet-1k, add --subset" * ("missing" in kinds)
    hint += "; replace or remove what is bad, or index with --skip-bad" * ("bad" in kinds)
    print(f"{counted(problems, 'problem')}, {repeated}{hint}" if findings else "all good")
    return 1 if problems else 0


def _print_findings(findings: "list[Finding]", file: Path | None) -> None:
    write_result(file, [finding._asdict() for finding in findings])
    printed: Counter[str] = Counter()
    for kind, path, text in findings:
        printed[kind] += 1
        if printed[kind] <= _PRINTED_FINDINGS:
            print(f"{kind}: {path}: {text}")
    for name, count in printed.items():
        if count > _PRINTED_FINDINGS:
            where = f"see {file}" if file else "--json FILE lists all"
            print(f"{name}: {count - _PRINTED_FINDINGS} more; {where}")


def _shard(args: argparse.Namespace) -> int:
    from tetdist.apps.images.shards import shard_split
    from tetdist.datasets.index import check_fresh, index_file, load_index

    _check_writable(args.dest, "DEST")
    pack: dict[str, Callable[..., Index]] = {}
    if args.from_parquet:
        from tetdist.apps.images import parquet

        names = args.splits or ["train", "val"]
        splits = {split: parquet.read_tables(args.root, split, args.workers) for split in names}
        classes = parquet.class_names(args.root, splits, subset=args.subset)
        for split, tables in splits.items():
            pack[split] = partial(parquet.shard_tables, split, tables, classes)
    else:
        folder = args.index or args.root / "index"
        indexed = sorted(file.stem for file in folder.glob("*.npz"))
        without_train = indexed if "train" not in indexed else []
        for split in args.splits or without_train or ["train", "val"]:
            file = index_file(folder, split)
            check_fresh(load_index(file), args.root, file)
            max_bytes = args.shard_mb * 2**20
            pack[split] = partial(shard_split, file, args.root, seed=args.seed, max_bytes=max_bytes)
    for split, write in pack.items():
        with file_progress(split, "shard") as progress:
            index = write(dest=args.dest, workers=args.workers, progress=progress)
        print(f"{args.dest / split}: {_described(index)}, packed and indexed")
    return 0
