"""Judge the ImageNet pipeline by a trained network: docs/results/imagenet_pipeline.*

    git clone https://github.com/songhan/SqueezeNet-Deep-Compression    # fb13faa
    git clone https://github.com/EliSchwartz/imagenet-sample-images     # bc69043
    python docs/make/pipeline.py SqueezeNet-Deep-Compression imagenet-sample-images

It writes the JSON file, and the answer and tables of the page, in half an hour of one core.
"""

import argparse
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pages
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torchvision import transforms as tv
from torchvision.datasets import ImageFolder
from torchvision.models import squeezenet1_0

from tetdist.apps.studies.numbers import spread
from tetdist.config.loading import load
from tetdist.data.build import eval_loader, train_loader
from tetdist.data.loader import Batch
from tetdist.data.splits import open_split
from tetdist.datasets.index import index_splits
from tetdist.distributed.world import join
from tetdist.tables import markdown
from tetdist.tracking.environment import environment

PAGE = pages.RESULTS / "imagenet_pipeline.md"
BATCH, DRAWS = 10, 10
MEAN, STD = tuple(level / 255 for level in (123, 117, 104)), (1 / 255,) * 3  # the network's
RIGHT = 4  # so many pipelines of `evaluated` are right, the others wrong


def decode(file: Path, convolutions: list[nn.Conv2d]) -> None:
    """Fill convolutions from a file of Deep Compression.

    A weight is a number in its convolution's codebook, and most are number 0: the file has the
    others, one byte each, and after them, in half a byte each, how many weights are before it.
    """
    with file.open("rb") as stream:
        counts = np.fromfile(stream, "<u4", len(convolutions))
        for convolution, count in zip(convolutions, counts.tolist(), strict=True):
            weight, bias = convolution.weight.data, convolution.state_dict()["bias"]
            codebook = np.fromfile(stream, "<f4", 256)
            bias.copy_(torch.from_numpy(np.fromfile(stream, "<f4", len(bias))))
            codes = np.fromfile(stream, np.uint8, count)
            pairs = np.fromfile(stream, np.uint8, (count + 1) // 2)
            before = np.stack([pairs % 16, pairs // 16], 1).reshape(-1)[:count].astype(int)
            numbers = np.zeros(weight.numel(), np.uint8)
            numbers[np.cumsum(before + 1) - 1] = codes
            weight.copy_(torch.from_numpy(codebook[numbers]).view_as(weight))
        if stream.read(1):
            raise SystemExit(f"error: {file} has more weights than the network; fetch it again")


def squeezenet(folder: Path) -> nn.Module:
    network = squeezenet1_0()
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    decode(folder / "compressed_SqueezeNet.net", convolutions)
    convolutions[-1].padding = (1, 1)  # as its authors have it, unlike torchvision
    convolutions[0].weight.data = convolutions[0].weight.data.flip(1)  # It was trained on BGR.
    return network.eval().to(memory_format=torch.channels_last)


class Outputs(NamedTuple):
    """Outputs of the network: logits (N, K) and labels (N,) by sample, the class of each label."""

    logits: Tensor
    labels: Tensor
    classes: Tensor

    def right(self, k: int) -> int:
        return int((self.logits.topk(k).indices == self.labels[:, None]).sum())

    def beside(self, control: "Outputs") -> dict[str, float]:
        """Return correct decisions, and differences from a control, with its margin there."""
        decisions, controls = (one.classes[one.logits.argmax(1)] for one in (self, control))
        far = (self.logits - control.logits).abs()
        first, second = control.logits[decisions != controls].topk(2).values.T
        return {
            "top1": self.right(1),
            "top5": self.right(5),
            "changed": len(first),
            "margin": max((first - second).tolist(), default=0.0),
            "largest": far.max().item(),
            "mean": far.mean().item(),
        }


@torch.inference_mode()
def outputs(network: nn.Module, batches: Iterable[Batch]) -> Outputs:
    """Return the outputs for batches that have each sample once."""
    rows = [(torch.from_numpy(one.ids), network(one.images), one.labels) for one in batches]
    ids, logits, labels = map(torch.cat, zip(*rows, strict=True))
    assert sorted(ids.tolist()) == list(range(len(ids)))
    order = ids.argsort()
    return Outputs(logits[order], labels[order], torch.arange(logits.shape[1]))


def of_tetdist(
    root: Path, size: int, draws: int = 0, mean: Any = MEAN, interpolation: str = "bilinear"
) -> Iterator[Batch]:
    """Yield the batches of tetdist's evaluation, or of some epochs of its training."""
    keys = {"root": root, "image_size": size, "interpolation": interpolation, "threads": 1}
    overrides = [f"data.{key}={value}" for key, value in keys.items()]
    overrides += [f"data.mean={list(mean)}", f"data.std={list(STD)}", f"batch.eval={BATCH}"]
    # 250 divides the 1,000 images, so that an epoch leaves none out.
    config = load("sew34_t4.yaml", [*overrides, "batch.global=250", f"batch.micro={BATCH}"])
    with join("cpu") as world:
        index = open_split(config.data, "train" if draws else "val", world)
        make = train_loader(config, index, world, 0) if draws else eval_loader(config, index, world)
        with make as batches:
            yield from islice(batches, draws * len(index) // BATCH if draws else None)


def of_torchvision(root: Path, *geometry: Any) -> Iterator[Batch]:
    """Yield the batches of torchvision, which decodes and resizes with PIL."""
    finish = tv.ToTensor(), tv.Normalize(MEAN, STD)
    data = ImageFolder(str(root / "val"), tv.Compose([*geometry, *finish]))
    for ids in np.array_split(np.arange(len(data)), -(-len(data) // BATCH)):
        images, labels = zip(*(data[i] for i in ids), strict=True)
        yield Batch(torch.stack(images), torch.tensor(labels), ids)


def evaluated(network: nn.Module, root: Path) -> dict[str, Outputs]:
    """Return the outputs of right and wrong pipelines."""
    resize, nearest = tv.Resize(256), tv.Resize(256, tv.InterpolationMode.NEAREST)
    black = 255 * torch.tensor(MEAN).view(3, 1, 1)
    pipelines = {
        "torchvision, 227": of_torchvision(root, resize, tv.CenterCrop(227)),
        "tetdist, 227": of_tetdist(root, 227),
        "torchvision, 224": of_torchvision(root, resize, tv.CenterCrop(224)),
        "tetdist, 224": of_tetdist(root, 224),
        "BGR": (
            batch._replace(images=(batch.images + black).flip(1) - black)
            for batch in of_tetdist(root, 227)
        ),
        "normalised without the mean": of_tetdist(root, 227, mean=(0, 0, 0)),
        "bicubic": of_tetdist(root, 227, interpolation="bicubic"),
        "nearest": of_torchvision(root, nearest, tv.CenterCrop(227)),
    }
    every = {name: outputs(network, batches) for name, batches in pipelines.items()}
    names = [file.name.partition("_")[2] for file in sorted((root / "val").glob("*/*"))]
    by_name = torch.tensor(sorted(range(len(names)), key=names.__getitem__))
    # Labels are then positions among the sorted names; the network's outputs stay the same.
    renamed = Outputs(every["tetdist, 227"].logits, by_name.argsort(), by_name)
    return every | {"classes ordered by name, not by WordNet id": renamed}


def drawn(network: nn.Module, root: Path) -> dict[str, list[list[int]]]:
    """Return the correct decisions, top-1 and top-5, of each draw of training crops."""
    training, counts = of_tetdist(root, 224, DRAWS), dict[str, list[list[int]]]()
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        crops = of_torchvision(root, tv.RandomResizedCrop(224), tv.RandomHorizontalFlip())
        for name, batches in (("torchvision", crops), ("tetdist", training)):
            right = outputs(network, islice(batches, 1000 // BATCH)).right
            counts.setdefault(name, []).append([right(1), right(5)])
    return counts


def write_layouts(files: list[Path], root: Path) -> None:
    """Write class folders, and from them shards, a training tar and Parquet files, all indexed."""
    tables, ids = root / "parquet/data", [file.name.partition("_")[0] for file in files]
    for folder in ("folders/train", "folders/val", "tar", "parquet/data"):
        (root / folder).mkdir(parents=True)
    with tarfile.open(root / "tar/ILSVRC2012_img_train.tar", "w") as archive:
        for file, name in zip(files, ids, strict=True):
            for split in ("train", "val"):
                (root / "folders" / split / name).mkdir()
                (root / "folders" / split / name / file.name).symlink_to(file.resolve())
            with tarfile.open(root / "class.tar", "w") as inner:
                inner.add(file, file.name)
            archive.add(root / "class.tar", f"{name}.tar")
    (root / "tar/val").symlink_to(root / "folders/val")
    for layout in ("folders", "tar"):
        index_splits(root / layout)
    # The Hugging Face hub's names end with the class.
    names = [f"{file.stem}_{name}.JPEG" for file, name in zip(files, ids, strict=True)]
    rows = [{"bytes": f.read_bytes(), "path": name} for f, name in zip(files, names, strict=True)]
    for split in ("train", "validation"):
        table = pa.table({"image": rows, "label": range(len(files))})
        pq.write_table(table, tables / f"{split}-00000-of-00001.parquet")
    tool = [sys.executable, str(pages.ROOT / "tools/images.py"), "shard", "--workers", "1"]
    for flags in (["folders", "shards"], ["parquet", "from Parquet", "--from-parquet", "--subset"]):
        subprocess.run([*tool, *flags], cwd=root, check=True)


def images_of(root: Path) -> list[tuple[int, bytes]]:
    """Return label and checksum of each image, as evaluated and as cropped for training."""
    images = {}
    for draws in (0, 1):
        for batch in of_tetdist(root, 224, draws):
            for i, label, image in zip(batch.ids, batch.labels, batch.images, strict=True):
                images[draws, int(i)] = int(label), hashlib.sha256(image.numpy().tobytes()).digest()
    return [image for _, image in sorted(images.items())]


def measured(network: nn.Module, files: list[Path], root: Path) -> dict[str, Any]:
    write_layouts(files, root)
    folders, layouts = root / "folders", dict[str, int]()
    known = images_of(folders)
    for layout in ("shards", "tar", "from Parquet"):
        same = [one == other for one, other in zip(images_of(root / layout), known, strict=True)]
        # A tar's evaluation reads the folders. Training's images, draw 1, come last.
        layouts[layout] = sum(same[len(files) :] if layout == "tar" else same)
    every = evaluated(network, folders)
    rows = {
        name: one.beside(every["torchvision, 224" if "224" in name else "torchvision, 227"])
        for name, one in every.items()
    }
    first, second = every["torchvision, 227"].logits.topk(2).values.mean(0).tolist()
    scale = {"first": first, "margin": first - second}
    draws = drawn(network, folders)
    return {"layouts": layouts, "pipelines": rows, "scale": scale, "draws": draws}


def page_of(record: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the answer and the tables of the page."""
    rows = record["pipelines"]
    changed = {name: row["changed"] for name, row in rows.items()}
    wrong = sorted(list(changed.values())[RIGHT:])
    crops = {
        name: [str(spread(list(column))) for column in zip(*draws, strict=True)]
        for name, draws in record["draws"].items()
    }
    answer = (
        f"Yes. tetdist's evaluation changes {changed['tetdist, 227']} of torchvision's 1,000 "
        f"decisions at 227 pixels and {changed['tetdist, 224']} at 224; {len(wrong)} wrong "
        f"pipelines change {wrong[0]} to {wrong[-1]}. With training crops, {crops['tetdist'][0]} "
        f"decisions are correct with tetdist, {crops['torchvision'][0]} with torchvision."
    )
    formats = {"top1": "d", "top5": "d", "changed": "d"}
    formats |= {"margin": ".3f", "largest": ".3f", "mean": ".4f"}
    cells = [[n, *(f"{row[k]:{spec}}" for k, spec in formats.items())] for n, row in rows.items()]
    images = [
        [name, f"{count:,} of {1_000 if name == 'tar' else 2_000:,}"]
        for name, count in record["layouts"].items()
    ]
    head = ["pipeline, pixels", "top-1", "top-5", "changed decisions", "their margin"]
    head += ["largest difference of outputs", "mean"]
    tables = [
        markdown(head, cells, numbers=True),
        markdown(["training crops", "top-1", "top-5"], [[k, *v] for k, v in crops.items()]),
        markdown(["layout", "equal images"], images),
    ]
    return answer, tables


def main() -> int:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    for folder in ("network", "images"):
        parser.add_argument(folder, type=Path)
    folders = parser.parse_args()
    files = sorted(folders.images.glob("n*.JPEG"))
    with tempfile.TemporaryDirectory() as root:
        record = measured(squeezenet(folders.network), files, Path(root))
    record |= {key: environment()[key] for key in ("python", "packages", "cpu")}
    answer, tables = page_of(record)
    pages.write(PAGE, answer, DRAWS, record, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
