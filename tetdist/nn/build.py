"""Builds the kernels in C++ (kernels/) and loads them.

A library is compiled once for each kind of neuron, in seconds, and kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# Why there are no kernels of a name, for whoever wants to say so.
failures: dict[str, str] = {}

KERNELS = Path(__file__).with_name("kernels")
# No fused multiply-add, so that rounding is that of torch. And neither errno nor floating-point
# traps: nobody looks at them, and they keep a compiler from vectorising choices.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"] + [
    f"-f{option}" for option in ("fp-contract=off", "no-math-errno", "no-trapping-math")
]
COMPILE_LIMIT = 300  # seconds


def load_library(name: str, *variant: str) -> ctypes.CDLL | None:
    """Load kernels/NAME.cpp; None without both a working compiler and an earlier result."""
    # The second folder is for caches that are full, or from which nothing may be executed.
    for folder in (_cache(), _private_cache()):
        try:
            return ctypes.CDLL(str(_built(KERNELS / f"{name}.cpp", variant, folder)))
        except (OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error).strip().splitlines()[-1]
    return None


def _built(source: Path, variant: tuple[str, ...], folder: Path) -> Path:
    """The library, from the folder or from a compiler.

    Raises:
        OSError, subprocess.SubprocessError: It is not there, and there is no working compiler.
    """
    text = source.read_bytes() + (KERNELS / "types.h").read_bytes()
    # Home folders are shared by machines with different processors.
    prefix = f"{source.stem}-{_digest(text, *FLAGS, *variant, _processor())}"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        # A machine without a compiler takes what one beside it has made.
        if (library := _whole_one(folder, f"{prefix}-*.so")) is not None:
            return library
        raise FileNotFoundError("there is no C++ compiler")
    prefix += f"-{_digest(*compiler, _run(*compiler, '--version'))}"
    if (library := _whole_one(folder, f"{prefix}-*.so")) is not None:
        return library
    logger.info("compiling kernels/%s, once (into %s)", source.name, folder)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        objects, built = Path(aside) / "kernels.o", Path(aside) / "kernels.so"
        _run(*compiler, *FLAGS, *variant, "-c", str(source), "-o", str(objects))
        # OpenMP's runtime is left out: torch has brought one, and two would fight for the cores.
        _run(*compiler, "-shared", str(objects), "-o", str(built))
        with built.open("rb") as file:
            os.fsync(file.fileno())
        library = folder / f"{prefix}-{_digest(built.read_bytes())}.so"
        # Several processes may build it at the same time; each finds a whole one.
        built.replace(library)
    return library


def _whole_one(folder: Path, pattern: str) -> Path | None:
    """A library whose contents are those that its name says; to load another could be a crash."""
    for library in sorted(folder.glob(pattern)):
        try:
            if library.stem.endswith(f"-{_digest(library.read_bytes())}"):
                return library
            logger.warning("%s is damaged and is built again", library)
            library.unlink(missing_ok=True)
        except OSError:
            continue
    return None


def _digest(*parts: str | bytes) -> str:
    data = b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(data).hexdigest()[:16]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT)
    if done.returncode != 0:
        raise subprocess.SubprocessError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def _cache() -> Path:
    """A folder of this user's own; what lies in it is loaded as code."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "tetdist"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _private_cache()


@functools.cache
def _private_cache() -> Path:
    """A folder that lives as long as this process, where there is no writable home."""
    import atexit

    folder = tempfile.mkdtemp(prefix="tetdist-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
