"""Loaders: what comes out, in which order, on any number of processes, and how they end."""

import dataclasses
import gc
import threading
from itertools import islice

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps
from samples import picture
from tiny import wait_until
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from tetdist import order
from tetdist.config.loading import load
from tetdist.config.sections.data import DataSection
from tetdist.data import build, event_augment, pixels, transforms
from tetdist.data.auto_augment import auto_augment
from tetdist.data.batches import Share, eval_batches, train_batches
from tetdist.data.dali import Workers
from tetdist.data.transforms import Transform
from tetdist.datasets.index import build_index, load_index
from tetdist.distributed.world import join
from tetdist.errors import UserError
from tetdist.plugins import Registry

WORKERS = Workers(device="cpu", device_id=None, threads=2, prefetch=2)
SHARE = Share(seed=5, global_batch=4, micro_batch=2, rank=0, world_size=1, epoch=0, step_in_epoch=0)
# With these, an image comes out as its pixel values.
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
CROPS = {"scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5}
OUTPUT = pixels.Output(size=32, interpolation="bilinear", **RAW)
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def section(index, root, **changes):
    values = {"kind": index.kind, "root": str(root), "roll": 2, "image_size": 32, "resize": 36}
    return DataSection.model_validate(values | RAW | CROPS | changes)


def train(index, root, *, share=SHARE, workers=WORKERS, **changes):
    return train_batches(section(index, root, **changes), index, share, 32, workers)


def evaluate(index, root, *, batch_size=5, rank=0, world_size=1, **changes):
    batches = list(order.evaluation_batches(len(index), batch_size, rank, world_size))
    return eval_batches(section(index, root, **changes), index, batches, WORKERS)


def indexed(root, split="train", kind="images"):
    index, bad = build_index(root, split, workers=1, kind=kind)
    assert bad == []
    return index


def difference(images, expected):
    """Mean and maximum distance of pixel values from those of PIL images."""
    stacked = np.stack([np.asarray(image, np.float32) for image in expected])
    distance = (images - torch.from_numpy(stacked).permute(0, 3, 1, 2)).abs()
    return distance.mean().item(), distance.max().item()


def test_a_batch_is_what_the_trainer_expects(image_root):
    root = image_root()
    index = indexed(root)
    with train(index, root, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5)) as batches:
        batch = next(batches)
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.ids.dtype == np.int64
    assert batch.labels.tolist() == index.labels[batch.ids].tolist()
    with train(index, root) as batches:
        raw = next(batches).images
    deviation = torch.tensor([0.5, 0.25, 0.5]).reshape(3, 1, 1)
    assert torch.allclose(batch.images, (raw / 255 - 0.5) / deviation, atol=1e-5)


@pytest.mark.parametrize(("interpolation", "largest"), [("bilinear", 1), ("bicubic", 8)])
def test_evaluation_crops_are_torchvisions(image_root, interpolation, largest):
    root = image_root(size=(41, 67))
    index = indexed(root)
    for batch in evaluate(index, root, interpolation=interpolation):
        images = [Image.open(root / index.path(i)).convert("RGB") for i in batch.ids]
        resized = [tv.resize(image, 36, MODES[interpolation]) for image in images]
        mean, most = difference(batch.images, [tv.center_crop(image, 32) for image in resized])
        assert mean < 0.5
        assert most <= largest


def test_every_kind_of_image_is_decoded_as_pil_does(tmp_path):
    image = picture(48, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "val" / "odd"
    folder.mkdir(parents=True)
    image.save(folder / "a.jpg", quality=95)
    image.save(folder / "b_turned.jpg", exif=exif)
    image.convert("L").save(folder / "c_gray.jpg")
    image.convert("CMYK").save(folder / "d_cmyk.jpg", quality=95)
    image.save(folder / "e_png_named.jpg", "PNG")
    image.convert("P").save(folder / "f_palette.png")
    image.convert("RGBA").save(folder / "g_alpha.png")
    image.save(folder / "h_progressive.jpg", progressive=True)
    image.save(folder / "i.webp")
    picture(75, 56).save(folder / "j_75x56.jpg")
    (tmp_path / "val" / "plain").mkdir()
    image.save(tmp_path / "val" / "plain" / "z.bmp")
    index = indexed(tmp_path, "val")
    # All in one batch, at their own size, but for the one that is not 48 x 40.
    (batch,) = evaluate(index, tmp_path, image_size=40, resize=40, batch_size=11)
    assert len(batch.ids) == 11
    for i, got in zip(batch.ids, batch.images, strict=True):
        expected = Image.open(tmp_path / index.path(i)).convert("RGB")
        expected = tv.center_crop(tv.resize(expected, 40), 40)
        mean, largest = difference(got[None], [expected])
        assert mean < 0.3, index.path(i)
        assert largest <= 1, index.path(i)


def test_the_resize_in_training_is_pillows_of_the_interpolation_asked_for(tmp_path):
    noise = np.random.default_rng(0)
    for k in range(4):
        file = tmp_path / "train" / ("one", "two")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (50, 40 + k, 3), np.uint8)).save(file)
    index = indexed(tmp_path)
    draws = order.uniforms(SHARE.seed, 0, np.arange(2), 22)

    def expected(i, draw, mode):
        sizes = index.heights[[i]], index.widths[[i]]
        (window,) = transforms.random_resized_crop(*sizes, draw[None], (0.2, 1.0), (3 / 4, 4 / 3))
        image = tv.crop(Image.open(tmp_path / index.path(i)), *window.tolist())
        # Rows first; see test_pixels.py.
        return tv.resize(tv.resize(image, [image.height, 32], mode), [32, 32], mode)

    for interpolation, other in (("bilinear", "bicubic"), ("bicubic", "bilinear")):
        with train(index, tmp_path, interpolation=interpolation, flip=0.0) as loader:
            batch = next(loader)
        for k, i in enumerate(batch.ids):
            right, wrong = (expected(i, draws[k], MODES[name]) for name in (interpolation, other))
            assert difference(batch.images[k], [right])[1] <= 1.01
            assert difference(batch.images[k], [wrong])[0] > 2


@pytest.fixture
def png_root(tmp_path):
    """12 images of 2 classes, 40 x 36 pixels and more, that are decoded without loss."""
    for k in range(12):
        file = tmp_path / "png" / "train" / ("one", "two")[k % 2] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(40 + k, 36 + 2 * k, k).save(file)
    return tmp_path / "png"


EVERYTHING = {
    "crop": "padded",
    "padding": 4,
    "auto_augment": "cifar10",
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "cutout": 10,
    "mixup": 0.2,
    "cutmix": 1.0,
}


def shifted(sample, draws):
    """Adds a constant of its own to each sample, which its draws decide."""
    return sample + 1000 * draws[0] + draws[1]


def doubled(sample, draws):
    assert draws == ()
    return sample.mul_(2)


SHIFTED, DOUBLED = Transform("shifted", shifted, 2), Transform("doubled", doubled, 0)


@pytest.fixture
def registered(monkeypatch):
    """The two transforms, registered for the time of a test."""
    table = Registry("transform", "data.transforms")
    monkeypatch.setattr(transforms, "TRANSFORMS", table)
    transforms.register_transform("shifted", draws=2)(shifted)
    transforms.register_transform("doubled")(doubled)


def test_every_augmentation_is_pillows_with_the_same_parameters(png_root):
    index = indexed(png_root)
    with train(index, png_root, **EVERYTHING) as loader:
        batches = list(islice(loader, 6))
    changes = 0
    for number, batch in enumerate(batches):
        positions = np.arange(2 * number, 2 * number + 2)
        draws = transforms.image_draws(SHARE.seed, 0, positions)
        operations = zip(
            auto_augment(draws.auto_augment, "cifar10", 32),
            transforms.color_jitter(draws.color_jitter, EVERYTHING["color_jitter"]),
            strict=True,
        )
        boxes = transforms.cutout_boxes(draws.cutout, 32, 32, 10)
        for k, (first, second) in enumerate(operations):
            i = batch.ids[k]
            image = ImageOps.expand(Image.open(png_root / index.path(i)), 4)
            free = np.array([image.height, image.width]) - 32
            top, left = (draws.crop[k, :2] * (free + 1)).astype(int)
            image = image.crop((left, top, left + 32, top + 32))
            if draws.flip[k, 0] < CROPS["flip"]:
                image = ImageOps.mirror(image)
            expected = pixels.operated(
                torch.from_numpy(np.array(image)), first + second, OUTPUT
            ).numpy()
            upper, left, lower, right = boxes[k]
            expected[upper:lower, left:right] = 0
            assert np.array_equal(batch.images[k].permute(1, 2, 0).round().numpy(), expected)
            changes += len(first)
    assert changes > 0


AS_EVENTS = {key: EVERYTHING[key] for key in ("crop", "padding", "auto_augment", "cutout", "mixup")}
AS_EVENTS["images_as_events"] = {"ratio": 0.12}
AS_TIMM = {
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "erasing": {"probability": 0.5, "mode": "pixel"},
    "mixup": 0.2,
    "transforms": ["shifted"],
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("changes", "repeats"), [(EVERYTHING, 1), (AS_TIMM, 3), (AS_EVENTS, 1)])
def test_augmented_batches_resume_and_share_out_as_others_do(png_root, changes, repeats):
    index = indexed(png_root)

    def batches(share, count, workers=WORKERS):
        share = dataclasses.replace(share, repeats=repeats)
        with train(index, png_root, share=share, workers=workers, **changes) as loader:
            return [(b.images, b.ids.tolist(), *b.mix) for b in islice(loader, count)]

    def assert_same(first, second):
        assert len(first) == len(second)
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert ours[1] == theirs[1]
            assert all(np.array_equal(a, b) for a, b in zip(ours[2:], theirs[2:], strict=True))

    straight = batches(SHARE, 18)
    # At the end of an epoch, at its beginning, and in it.
    for epoch, step in ((0, 3), (1, 0), (2, 1)):
        resumed = dataclasses.replace(SHARE, epoch=epoch, step_in_epoch=step)
        done = 2 * (3 * epoch + step)
        assert_same(batches(resumed, 18 - done), straight[done:])
    workers = dataclasses.replace(WORKERS, threads=1, prefetch=4)
    assert_same(batches(SHARE, 18, workers), straight)
    other = batches(dataclasses.replace(SHARE, seed=6), 1)
    assert not torch.equal(other[0][0], straight[0][0])
    for rank in (0, 1):
        share = dataclasses.replace(SHARE, rank=rank, world_size=2)
        assert_same(batches(share, 9), straight[rank::2])
    counts = np.unique(np.concatenate([ids for _, ids, *_ in straight[:6]]), return_counts=True)[1]
    assert counts.tolist() == [repeats] * (12 // repeats)
    # Two samples of an epoch are never changed alike.
    assert len({image.numpy().tobytes() for batch in straight[:6] for image in batch[0]}) == 12
    kept = np.concatenate([share for _, _, share, *_ in straight[:6]])
    assert len(set(kept)) > 6


def images_and_ids(loader, count=None):
    with loader:
        return [(batch.images.clone(), batch.ids.tolist()) for batch in islice(loader, count)]


def same(first, second):
    return len(first) == len(second) and all(
        a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True)
    )


def damage(file):
    """The same size and a good header, but nothing behind it."""
    data = file.read_bytes()
    file.write_bytes(data[:700] + bytes(len(data) - 700))


def shrink(file):
    """As many bytes as before, but a smaller image."""
    size = file.stat().st_size
    picture(10, 10).save(file)
    file.write_bytes(file.read_bytes().ljust(size, b"\0"))


@pytest.mark.parametrize(
    ("training", "spoil", "words"),
    [
        (True, lambda file: file.unlink(), "No such file"),
        (False, lambda file: file.write_bytes(file.read_bytes()[:-9]), "instead of the index's"),
        (True, lambda file: file.write_bytes(b"x" * file.stat().st_size), "not an image"),
        (False, damage, "cannot be decoded"),
        (False, shrink, "its size differs from the index"),
    ],
)
def test_a_file_that_went_bad_is_named(image_root, training, spoil, words):
    root = image_root()
    index = indexed(root)
    spoil(root / index.path(7))
    loader = train(index, root, scale=(0.9, 1.0)) if training else evaluate(index, root)
    with pytest.raises(UserError, match=words) as error:
        list(loader)
    assert "train/bee/bee3.jpg" in str(error.value)
    assert "tools/images.py index" in str(error.value)
    assert list(loader) == []


@pytest.mark.parametrize("kind", ["images", "events"])
def test_a_loader_leaves_nothing_running(image_root, event_root, kind):
    root = image_root() if kind == "images" else event_root()
    index = indexed(root, kind=kind)
    list(evaluate(index, root))  # DALI keeps a few threads of its own after the first.
    gc.collect()  # Of the tests before: a traceback keeps the pipeline that it went through.
    tasks = psutil.Process().num_threads
    before, threads = tasks(), threading.active_count()
    list(evaluate(index, root))
    # A thread that was joined may be listed a moment longer.
    wait_until(lambda: tasks() == before, 5)
    for _ in range(2):
        with train(index, root) as loader:
            batch = next(loader)
            assert tasks() > before
        assert list(loader) == []
        loader.close()
    wait_until(lambda: tasks() == before, 5)
    assert threading.active_count() == threads
    # What was taken is still there, and still the same.
    with train(index, root) as loader:
        assert torch.equal(next(loader).images, batch.images)


def stored(index, root, ids):
    return np.stack([np.load(root / index.path(i)) for i in ids]).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_events_come_out_as_stored(event_root, dtype):
    root = event_root(dtype)
    index = indexed(root, "val", "events")
    seen = []
    for rank in range(2):
        batches = list(evaluate(index, root, batch_size=4, rank=rank, world_size=2))
        assert [len(batch.ids) for batch in batches] == ([4, 2] if rank == 0 else [4, 0])
        for batch in batches:
            assert batch.images.dtype == torch.float32
            assert batch.labels.tolist() == index.labels[batch.ids].tolist()
            if len(batch.ids):
                assert np.array_equal(batch.images.numpy(), stored(index, root, batch.ids))
            seen.extend(batch.ids.tolist())
    assert sorted(seen) == list(range(10))


def test_event_augmentation_is_one_flip_and_one_roll_a_sample(event_root):
    root = event_root()
    index = indexed(root, kind="events")  # 10 samples: 2 steps of 4
    flipped, moved = set(), set()
    with train(index, root) as loader:
        for number, batch in enumerate(islice(loader, 40)):
            epoch, positions = number // 4, 2 * (number % 4) + np.arange(2)
            draws = order.uniforms(SHARE.seed, epoch, positions, 3)
            moves = transforms.shifts(draws[:, 1:], 2).tolist()
            frames = stored(index, root, batch.ids)
            for got, before, draw, move in zip(batch.images, frames, draws, moves, strict=True):
                expected = before[..., ::-1] if draw[0] < 0.5 else before
                expected = np.roll(expected, move, axis=(2, 3))
                assert np.array_equal(got.numpy(), expected)
                flipped.add(draw[0] < 0.5)
                moved.add(tuple(move))
    assert flipped == {False, True}
    assert {down for down, _ in moved} == {right for _, right in moved} == set(range(-2, 3))


def test_events_are_changed_after_the_roll_and_before_the_cutout(event_root):
    root = event_root()
    index = indexed(root, kind="events")
    rolled = images_and_ids(train(index, root), 4)
    changes = {"event_augment": "nda", "cutout": 3}
    changed = images_and_ids(train(index, root, **changes), 4)
    for number, ((before, ids), (after, same_ids)) in enumerate(zip(rolled, changed, strict=True)):
        assert ids == same_ids
        positions = 2 * number + np.arange(2)
        numbers = order.uniforms(SHARE.seed, 0, positions, 4, event_augment.OPERATION_STREAM)
        boxes = transforms.cutout_boxes(
            transforms.event_draws(SHARE.seed, 0, positions).cutout, 8, 6, 3
        )
        for k, operation in enumerate(event_augment.operations(numbers, "nda", (8, 6))):
            frames = event_augment.operated(before[k].numpy(), operation)
            pixels.cut_out(frames, boxes[k])
            assert np.array_equal(after[k].numpy(), frames)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", ["images", "events"])
def test_transforms_of_ones_own_are_applied_in_order_with_draws_of_their_own(
    image_root, event_root, kind
):
    root = event_root() if kind == "events" else image_root()
    index = indexed(root, kind=kind)

    def training(*names):
        return images_and_ids(train(index, root, transforms=names), 8)

    plain, changed = training(), training("shifted", "doubled")
    per_epoch = 4 if kind == "events" else 6  # batches
    for number, ((before, ids), (after, same_ids)) in enumerate(zip(plain, changed, strict=True)):
        assert ids == same_ids
        epoch, step = divmod(number, per_epoch)
        draws = SHIFTED.draws(SHARE.seed, epoch, 2 * step + np.arange(2))
        for k, draw in enumerate(draws.tolist()):
            assert torch.equal(after[k], 2 * shifted(before[k], tuple(draw)))
    # Its draws are those that it has alone.
    alone = training("shifted")
    assert same([(2 * images, ids) for images, ids in alone], changed)


def test_draws_of_a_transform_are_its_own_and_never_change():
    positions = np.arange(2)
    draws = SHIFTED.draws(0, 0, positions)
    assert [x.hex() for x in draws.ravel().tolist()] == [
        "0x1.6181c46b25974p-1",
        "0x1.82b54b1afe4aap-2",
        "0x1.0f5cd645cc3dbp-1",
        "0x1.f3d01b5d20523p-1",
    ]
    assert not np.isin(draws, order.uniforms(0, 0, positions, 50)).any()
    assert not np.isin(draws, order.uniforms(0, 0, positions, 50, order.MIXING)).any()
    assert not np.isin(draws, Transform("other", shifted, 50).draws(0, 0, positions)).any()
    more = Transform("shifted", shifted, 5).draws(0, 0, positions)
    assert np.array_equal(more[:, :2], draws)
    assert DOUBLED.draws(0, 0, positions).shape == (2, 0)


@pytest.mark.usefixtures("registered")
def test_a_transform_that_does_not_keep_the_shape_is_named(image_root):
    transforms.register_transform("smaller")(lambda sample, _: sample[:, 1:])
    root = image_root()
    loader = train(indexed(root), root, transforms=["smaller"])
    with pytest.raises(UserError, match=r"data\.transforms: smaller .*\(3, 31, 32\)"):
        next(loader)
    assert list(loader) == []


@pytest.mark.usefixtures("registered")
def test_the_configuration_names_transforms_which_change_training_alone(tiny_root, tiny_config):
    index = load_index(tiny_root / "index" / "train.npz")

    def evaluated(*names):
        config = load(tiny_config({"data.transforms": list(names)}), [])
        build.check_augmentation(config.data, index)
        with join("cpu") as world:
            return images_and_ids(build.eval_loader(config, index, world), 2)

    assert same(evaluated(), evaluated("shifted"))
    with pytest.raises(UserError, match=r"data\.transforms: .*'shiftet'"):
        evaluated("shiftet")
    with pytest.raises(UserError, match=r"data\.transforms: 'shifted' is listed twice"):
        evaluated("shifted", "shifted")
