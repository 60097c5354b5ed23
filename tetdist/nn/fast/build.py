"""Builds the C++ kernels (kernels/) and loads them.

Compiling takes seconds, happens once per kind of neuron, and is cached in the user's folder.
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

# Reasons why kernels could not be loaded, by name, for messages.
failures: dict[str, str] = {}

KERNELS = Path(__file__).with_name("kernels")
# No fused multiply-add, so that rounding equals torch's. No errno or floating-point traps: they are
# unused, and keep the compiler from vectorising branches.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC"] + [
    f"-f{option}" for option in ("fp-contract=off", "no-math-errno", "no-trapping-math")
]
COMPILE_LIMIT = 300  # seconds
_ASIDE = "tetdist-kernels-"  # prefix of folders in which a library is being built


def load_library(name: str, *variant: str) -> ctypes.CDLL | None:
    """Load kernels/NAME.cpp; None without a cached build or a working compiler."""
    # The second folder serves if the cache is full or forbids execution.
    for open_folder in (_cache, _passing_folder):
        try:
            with open_folder() as folder:
                return ctypes.CDLL(str(_built(KERNELS / f"{name}.cpp", variant, folder)))
        except (OSError, subprocess.SubprocessError) as error:
            failures[name] = str(error).strip().splitlines()[-1]
    return None


def _built(source: Path, variant: tuple[str, ...], folder: Path) -> Path:
    """Return the library from the folder, or compile it.

    Raises:
        OSError, subprocess.SubprocessError: It is not cached, and there is no working compiler.
    """
    headers = sorted(KERNELS.glob("*.h"))
    text = b"".join(file.read_bytes() for file in (source, *headers))
    # Machines with different processors may share a home folder.
    prefix = f"{source.stem}-{_digest(text, *FLAGS, *variant, processor())}"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        # Without a compiler, use a library that another machine built.
        if (library := _whole_one(folder, f"{prefix}-*.so")) is not None:
            return library
        raise FileNotFoundError("there is no C++ compiler")
    prefix += f"-{_digest(*compiler, _run(*compiler, '--version'))}"
    if (library := _whole_one(folder, f"{prefix}-*.so")) is not None:
        return library
    logger.info("compiling kernels/%s, once (into %s)", source.name, folder.resolve())
    _remove_leftovers(folder)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=folder) as aside:
        objects, built = Path(aside) / "kernels.o", Path(aside) / "kernels.so"
        _run(*compiler, *FLAGS, *variant, "-c", str(source), "-o", str(objects))
        # OpenMP's runtime is left out: torch has loaded one, and two would compete for the cores.
        _run(*compiler, "-shared", str(objects), "-o", str(built))
        with built.open("rb") as file:
            os.fsync(file.fileno())
        built.chmod(0o700)
        library = folder / f"{prefix}-{_digest(built.read_bytes())}.so"
        # Several processes may build it at once; each sees only complete files.
        built.replace(library)
    return library


def _whole_one(folder: Path, pattern: str) -> Path | None:
    """Return a library whose contents match the hash in its name; others could crash."""
    for library in sorted(folder.glob(pattern)):
        try:
            facts = library.lstat()
            if not (stat.S_ISREG(facts.st_mode) and is_ours_alone(facts)):
                logger.warning("%s is writable by other users and is rebuilt", library.resolve())
            elif library.stem.endswith(f"-{_digest(library.read_bytes())}"):
                return library
            else:
                logger.warning("%s is damaged and is rebuilt", library.resolve())
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
    """Yield this user's cache folder, whose files are loaded as code.

    The path is that of the opened folder: another user may own a link on the way to it, and lead
    that elsewhere after the check.

    Raises:
        OSError: There is no folder that only this user can write to.
    """
    try:
        folder = own_cache()
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not is_ours_alone(os.fstat(descriptor)):
                raise OthersMayWrite(folder)
            yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        finally:
            os.close(descriptor)
    except OthersMayWrite as error:
        _warn_of(error.folder)
        raise


@functools.cache  # once for all libraries
def _warn_of(folder: Path) -> None:
    logger.warning(
        "%s can be changed by other users, so kernels are not loaded from it but compiled at every "
        "start; set XDG_CACHE_HOME to a folder of your own, or run `chmod go-w %s`, if it is yours",
        *(folder, shlex.quote(str(folder))),
    )


@contextlib.contextmanager
def _passing_folder() -> Iterator[Path]:
    """Yield a temporary folder, for lack of a cache: a loaded library needs no file."""
    parent = Path(tempfile.gettempdir())
    _remove_leftovers(parent)
    with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=parent) as folder:
        yield Path(folder)


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes left there that were killed while compiling."""
    for leftover in folder.glob(f"{_ASIDE}*"):
        with contextlib.suppress(OSError):
            facts = leftover.lstat()
            # Compiling takes two commands with time limits, so no process still works there.
            if facts.st_uid == os.getuid() and time.time() - facts.st_mtime > 3 * COMPILE_LIMIT:
                shutil.rmtree(leftover)


def processor() -> str:
    """Return the line of the processor's extensions."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()
