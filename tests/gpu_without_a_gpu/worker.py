"""Starts run_steps.py, and asks it."""

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils import cpp_extension

from tetdist.storage.files import OthersMayWrite, own_cache

HERE = Path(__file__).parent
Answer = dict[str, Any]

# A configuration of each network, and what is changed of it.
CONFIGS: dict[str, tuple[str, ...]] = {
    "sew_resnet": ("sew34_t4.yaml",),
    "i2e_msnet": ("i2e_msnet18.yaml", "loss.kind=tet"),
    "spiking_convnet": ("quickstart.yaml", "precision=bf16", "phases.0.optimizer.kind=sgd"),
    "vggsnn": ("vggsnn_dvs.yaml",),
    "sdt": ("sdt_8_384.yaml", "loss.kind=tet"),
    "sdt_2_256_dvs": ("vggsnn_dvs.yaml", "model.arguments={}"),
    "espikeformer_t": ("espikeformer_s.yaml", "loss.kind=tet"),
}


class Worker:
    """Answers cases, one after another.

    Args:
        process: run_steps.py.
        log: The file of its standard error.
    """

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        assert process.stdout is not None
        self._selector = selectors.DefaultSelector()
        self._selector.register(process.stdout, selectors.EVENT_READ)
        assert self._read(200) == {"ready": True}

    def run(self, model: str, *overrides: str, **about: Any) -> Answer:
        """Run a case at T = 4, with these fields of `Case`; its answer is that of `report`."""
        base, *changes = CONFIGS.get(model) or CONFIGS[model.rstrip("0123456789_")]
        # The last one of a key counts.
        pairs = (pair.split("=", 1) for pair in [*changes, "phases.0.timesteps=4", *overrides])
        changes = [f"{key}={value}" for key, value in dict(pairs).items()]
        return self._answer({"model": model, "base": base, "overrides": changes, **about})

    def made_up(self, model: str, steps: int, **about: Any) -> Answer:
        """Take steps of check_gpu, with these arguments of `training_step`."""
        return self._answer({"model": model, "base": "", "steps": steps, "made_up": about})

    def order(self, config: Path, *overrides: str, fault: Sequence[str] | None = None) -> Answer:
        """Train two steps with the data of a configuration, and check the order of all work."""
        asked = {"model": "", "base": str(config), "overrides": list(overrides)}
        return self._answer(asked | {"feeds": True, "fault": fault, "steps": 2})

    def _answer(self, asked: dict[str, Any]) -> Answer:
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read(280)

    def _read(self, seconds: float) -> Answer:
        ready = self._selector.select(seconds)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
        assert line, f"no answer: {self._log.read_text()[-2000:]}"
        answer: Answer = json.loads(line)
        return answer


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Worker]:
    """A process to be asked, which ends with the context; ``folder`` is for its files."""
    log = folder / "log"
    extra = {
        "LD_PRELOAD": str(_guard(folder)),
        "PYTHONPATH": os.pathsep.join(map(str, (tiny.PROJECT, HERE, HERE.parent))),
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (
        log.open("w") as errors,
        tiny.started(
            tiny.python(HERE / "run_steps.py"),
            folder,
            tiny.clean_environment(**extra),
            stdin=subprocess.PIPE,
            stderr=errors,
        ) as process,
    ):
        yield Worker(process, log)


def _guard(folder: Path) -> Path:
    """Build cuda_guard.cpp's library, as torch's own extensions are, or find it in the cache."""
    libraries = cpp_extension.library_paths()
    command = [
        cpp_extension.get_cxx_compiler(),
        *("-std=c++20", "-O0", "-fPIC", "-shared", "cuda_guard.cpp"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in cpp_extension.include_paths()),
        *(f"-L{path}" for path in libraries),
        *(f"-Wl,-rpath,{path}" for path in libraries),
        *("-lc10", "-ltorch_cpu"),
    ]
    with contextlib.suppress(OSError, OthersMayWrite):  # no cache
        folder = own_cache()
    made_of = [torch.__version__, *command, (HERE / "cuda_guard.cpp").read_text()]
    library = folder / f"guard-{sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        passing = library.with_suffix(f".{os.getpid()}")
        status, output = tiny.execute([*command, "-o", str(passing)], HERE, timeout=200)
        assert status == 0, output
        passing.replace(library)
    return library


def launches(answer: Answer, *phases: str) -> int:
    """Kernels of the last step in the given phases."""
    return sum(sum(answer["launches"].get(phase, {}).values()) for phase in phases)
