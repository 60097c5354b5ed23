"""Builds the kernels in C++ (kernels/) and loads them.

A library is compiled once for each kind of neuron, in seconds, and kept in the user's cache folder.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tetdist.storage.files import OthersMayWrite, is_ours_alone, own_cache

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
_ASIDE = "tetdist-kernels-"  # begins the names of folders in which a library is being made


def load_library(name: str, *variant: str) -> ctypes.CDLL | None:
    """Load kernels/NAME.cpp; None without both a working compiler and an earlier result."""
    # The second folder is for caches that are full, or from which nothing may be executed.
    for open_folder in (_cache, _passing_folder):
        try:
            with open_folder() as folder:
                return ctypes.CDLL(str(_built(KERNELS / f"{name}.cpp", variant, folder)))
        except (OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error).strip().splitlines()[-1]
    return None


def _built(source: Path, variant: tuple[str, ...], folder: Path) -> Path:
    """The library, from the folder or from a compiler.

    Raises:
        OSError, subprocess.SubprocessError: It is not there, and there is no working compiler.
    """
    headers = sorted(KERNELS.glob("*.h"))
    text = b"".join(file.read_bytes() for file in (source, *headers))
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
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=folder) as aside:
        objects, built = Path(aside) / "kernels.o", Path(aside) / "kernels.so"
        _run(*compiler, *FLAGS, *variant, "-c", str(source), "-o", str(objects))
        # OpenMP's runtime is left out: torch has brought one, and two would fight for the cores.
        _run(*compiler, "-shared", str(objects), "-o", str(built))
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.chmod(0o700)
        library = folder / f"{prefix}-{_digest(built.read_bytes())}.so"
        # Several processes may build it at the same time; each finds a whole one.
        built.replace(library)
    return library


def _whole_one(folder: Path, pattern: str) -> Path | None:
    """A library whose contents are those that its name says; to load another could be a crash."""
    for library in sorted(folder.glob(pattern)):
        try:
            facts = library.lstat()
            if not (stat.S_ISREG(facts.st_mode) and is_ours_alone(facts)):
                logger.warning("%s is writable by other users and is rebuilt", library)
            elif library.stem.endswith(f"-{_digest(library.read_bytes())}"):
                return library
            else:
                logger.warning("%s is damaged and is rebuilt", library)
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


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """The folder of this user's own; what lies in it is loaded as code.

    Raises:
        OSError: There is none that only this user can write to.
    """
    try:
        yield own_cache()
    except OthersMayWrite as error:
        _warn_of(error.folder)
        raise


@functools.cache  # once for all libraries
def _warn_of(folder: Path) -> None:
    logger.warning(
        "%s is writable by other users, so kernels are not loaded from it but compiled at every "
        "start; its owner can fix that with `chmod go-w %s`",
        *(folder, shlex.quote(str(folder))),
    )


@contextlib.contextmanager
def _passing_folder() -> Iterator[Path]:
    """A folder for the moment, where there is no cache: a loaded library needs its file no more."""
    parent = Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=parent) as folder:
        yield Path(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what was left there by processes that were killed while they compiled."""
    for leftover in folder.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):
            facts = leftover.lstat()
            # Two commands of the compiler are bounded in time, so nobody works there any more.
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > 3 * COMPILE_LIMIT:
                shutil.rmtree(leftover)


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
