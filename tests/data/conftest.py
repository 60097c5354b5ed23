"""Small image folders and indexes, made anew for each test, and the tools to call on them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import picture

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def image_root(tmp_path: Path) -> Callable[..., Path]:
    """Makes a data root of JPEG files, 2 splits of 3 classes: (per_class=4, size=...) -> root."""

    def make(per_class: int = 4, size: tuple[int, int] = (60, 80)) -> Path:
        root = tmp_path / "images"
        seed = 0
        for split in ("train", "val"):
            for name in ("ant", "bee", "cow"):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    image = picture(size[0] + 3 * i, size[1] + 5 * i, seed)
                    image.save(folder / f"{name}{i}.jpg", quality=95)
                    seed += 1
        return root

    return make


@pytest.fixture
def event_root(tmp_path: Path) -> Callable[..., Path]:
    """Makes a data root of event tensors, 2 splits of 2 classes of 5: (dtype=uint8) -> root."""

    def make(dtype: type[np.generic] = np.uint8, shape: tuple[int, ...] = (3, 2, 8, 6)) -> Path:
        root = tmp_path / "events"
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            for name in ("left", "right"):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(5):
                    np.save(folder / f"{i}.npy", rng.integers(0, 200, shape).astype(dtype))
        return root

    return make


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a tool in this process, which saves the seconds of its imports: status and output."""

    def run_main(tool: str, *arguments: object) -> tuple[int, str]:
        spec = importlib.util.spec_from_file_location("tool", TOOLS / tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        try:
            status = module.main()
        except SystemExit as e:
            status = e.code
        return status, "".join(capsys.readouterr())

    return run_main
