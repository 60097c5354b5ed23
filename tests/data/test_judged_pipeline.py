"""docs/make/pipeline.py, which judges the pipeline of images by a trained network."""

import importlib
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from samples import picture
from torch import nn

from tetdist.datasets.index import index_splits


@pytest.fixture
def made(monkeypatch):
    monkeypatch.syspath_prepend(tiny.PROJECT / "docs/make")
    return importlib.import_module("pipeline")


def test_compressed_weights_are_decoded(made, tmp_path):
    rng, parts, expected = np.random.default_rng(0), [], []
    convolutions = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 2)]
    for convolution, count in zip(convolutions, (21, 14), strict=True):
        codebook, bias = (rng.normal(size=n).astype("<f4") for n in (256, len(convolution.bias)))
        before, codes = rng.integers(0, 16, count), rng.integers(0, 256, count)
        halves = np.append(before, [0] * (count % 2)).reshape(-1, 2) @ (1, 16)
        parts += [codebook, bias, codes.astype(np.uint8), halves.astype(np.uint8)]
        weight = np.full(convolution.weight.shape, codebook[0])
        weight.flat[np.cumsum(before + 1) - 1] = codebook[codes]
        expected += [weight, bias]
    data = np.array([21, 14], "<u4").tobytes() + b"".join(map(bytes, parts))
    (file := tmp_path / "net").write_bytes(data)
    made.decode(file, convolutions)
    decoded = [array.detach() for one in convolutions for array in (one.weight, one.bias)]
    assert all(map(np.array_equal, decoded, expected))
    file.write_bytes(data + b" ")
    with pytest.raises(SystemExit, match="more weights"):
        made.decode(file, convolutions)


def test_wrong_pipelines_are_seen(made, tmp_path):
    for k, name in enumerate("fdbeca"):
        image = np.asarray(picture(330 + 9 * k, 300, seed=k)) // 2
        noise = np.random.default_rng(k).integers(0, 128, image.shape, np.uint8)
        for split in ("train", "val"):
            folder = tmp_path / split / f"n{k}"
            folder.mkdir(parents=True)
            Image.fromarray(image + noise).save(folder / f"n{k}_{name}.png")
    index_splits(tmp_path)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    every = made.evaluated(nn.Sequential(*layers, nn.Linear(256, 6)), tmp_path)
    rows = {name: one.beside(every["torchvision, 227"]) for name, one in every.items()}
    far = {name: row["mean"] for name, row in rows.items()}
    assert far["tetdist, 227"] < 0.01
    assert every["tetdist, 224"].beside(every["torchvision, 224"])["mean"] < 0.01
    *others, by_name = list(rows)[made.RIGHT :]
    assert min(far[name] for name in ("tetdist, 224", *others)) > 0.1
    assert every[by_name].labels.tolist() == ["abcdef".index(name) for name in "fdbeca"]
    assert (rows[by_name]["changed"], far[by_name]) == (6, far["tetdist, 227"])


def test_the_page_is_that_of_its_numbers(made):
    record, text = json.loads(made.PAGE.with_suffix(".json").read_text()), made.PAGE.read_text()
    answer, tables = made.page_of(record)
    assert made.pages.with_tables(made.pages.with_answer(text, answer), tables) == text
    assert answer == record["answer"]
