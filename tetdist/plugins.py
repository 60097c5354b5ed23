"""User plug-ins: imported files and the registries they extend.

A configuration's ``imports: [my_snn.py]``, or a command's ``--import my_snn.py``, imports a Python
file before the configuration is checked. The file registers models (with timm's
``register_model``), neurons, losses, optimisers, transforms and trackers, which then have names
like tetdist's own. docs/extending.md has an example of each.

An imported file is part of a run. A copy and its checksum are kept in the run's folder, a resumed
run needs the same file, and a job on a cluster imports a copy. A checkpoint is data: it lists the
imported files, and never imports any.
"""

import difflib
import hashlib
import importlib.util
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar, cast

from tetdist.errors import UserError
from tetdist.storage.files import open_file, replacing, write_text

logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E")

# The package of imported files: in one of them, `from tetdist_imports.helpers import ...` means the
# file helpers.py, which must be imported before it.
PACKAGE = "tetdist_imports"
CHECKSUMS = "SHA256SUMS"


class Registry(Mapping[str, T], Generic[T]):
    """A table of entries by name, which imported files can extend.

    Args:
        what: The kind of its entries, in errors, such as ``loss``.
        key: The configuration's key for the names.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what, self.key = what, key
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Make a decorator that enters its object under ``name``.

        Raises:
            UserError: Another module has used that name.
        """

        def enter(entry: E) -> E:
            self.enter(name, cast(T, entry), getattr(entry, "__module__", "?"))
            return entry

        return enter

    def enter(self, name: str, entry: T, module: str) -> None:
        """Enter an object of a module under ``name``.

        Raises:
            UserError: Another module has used that name.
        """
        owner = self._modules.get(name, module)
        if owner != module:
            raise UserError(
                f"{_file_of(module)} registers the {self.what} {name!r}, which {_file_of(owner)} "
                "has registered; give it another name"
            )
        self._entries[name], self._modules[name] = entry, module

    def __getitem__(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            UserError: There is none.
        """
        return self.find(name, self.key)

    def find(self, name: str, key: str) -> T:
        """Return the entry of a name that is the value of ``key`` in a configuration.

        Raises:
            UserError: There is none.
        """
        if name not in self._entries:
            raise UserError(f"{key}: {self.none_of(name)}")
        return self._entries[name]

    def none_of(self, name: str) -> str:
        """Return the error message for an unknown name."""
        return f"there is no {self.what} {name!r}; {self.hint(name)}"

    def hint(self, name: str) -> str:
        """Suggest the names that an unknown name may have meant."""
        close = difflib.get_close_matches(name, self._entries, n=1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(self._entries)}"
        return f"{known} (for your own, add its file: imports: [FILE.py], or --import FILE.py)"

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _file_of(module: str) -> str:
    """Return the file of an imported module, or another module's name, for messages."""
    found = getattr(sys.modules.get(module), "__file__", None)
    return str(found) if found and module.startswith(f"{PACKAGE}.") else module


@dataclass(frozen=True)
class Imported:
    """A file that was imported."""

    path: Path
    sha256: str

    @property
    def name(self) -> str:
        return self.path.name


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file to be imported, in hexadecimal.

    Raises:
        UserError: It is missing, or no Python file.
    """
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UserError(f"imports: {path} must be a Python file named in one word, as my_snn.py")
    try:
        with open_file(path) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise UserError(f"imports: {path} cannot be read ({error.strerror})") from error


def import_files(paths: Iterable[str | Path]) -> list[Imported]:
    """Import files in order, except unchanged ones that are imported already.

    Raises:
        UserError: A file cannot be read, raises, or registers a used name; or two files have the
            same name.
    """
    found: dict[str, Imported] = {}
    for path in map(Path, paths):
        one = Imported(path.absolute(), checksum(path))
        if found.setdefault(one.name, one).path != one.path:
            other = found[one.name].path
            raise UserError(f"imports: {other} and {path} have the same name; rename one")
        _import(one)
    return list(found.values())


def checksums_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the SHA-256 by name of imported files, as of when they were imported."""
    names = [Path(path).name for path in paths]
    return {name: sys.modules[f"{PACKAGE}.{Path(name).stem}"].sha256 for name in names}


def _import(file: Imported) -> None:
    name = f"{PACKAGE}.{file.path.stem}"
    if getattr(sys.modules.get(name), "sha256", None) == file.sha256:
        return
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = []
        sys.modules[PACKAGE] = package
    import timm

    before = {model: timm.model_entrypoint(model) for model in timm.list_models()}
    spec = importlib.util.spec_from_file_location(name, file.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.sha256 = file.sha256  # type: ignore[attr-defined]  # for checksums_of
    # Decorators look up their function's module there.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        line = _line_of(error, file.path)
        raise UserError(
            f"imports: {file.path}{line} raises {type(error).__name__}: {error}"
        ) from error
    for model, entrypoint in before.items():
        if timm.model_entrypoint(model) is not entrypoint and entrypoint.__module__ != name:
            del sys.modules[name]
            # timm warns of the used name when it is restored.
            with warnings.catch_warnings(action="ignore"):
                timm.models.register_model(entrypoint)
            raise UserError(
                f"imports: {file.path} registers the model {model!r}, which "
                f"{entrypoint.__module__} has registered already; give it another name"
            )


def _line_of(error: BaseException, path: Path) -> str:
    """Return ``:LINE`` of the file's innermost frame in an error's traceback."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path]
    return f":{lines[-1]}" if lines else ""


# --- in a run's folder, and in checkpoints --------------------------------------------------------


def keep(files: Iterable[Imported], folder: Path) -> tuple[str, ...]:
    """Copy imported files to a folder, with their checksums as ``sha256sum -c`` reads them.

    Returns:
        The copies' paths.
    """
    files = list(files)
    copies = [folder / file.name for file in files]
    if files or folder.exists():  # it may hold files of a run that failed before it began
        folder.mkdir(parents=True, exist_ok=True)
        for file, copy in zip(files, copies, strict=True):
            with replacing(copy) as stream:
                stream.write(file.path.read_bytes())
        write_text(folder / CHECKSUMS, "".join(f"{one.sha256}  {one.name}\n" for one in files))
    return tuple(str(copy.absolute()) for copy in copies)


def kept(folder: Path) -> dict[str, str]:
    """Return the checksums of the files in a folder written by `keep`, by name."""
    sums = folder / CHECKSUMS
    if not sums.is_file():
        return {}
    pairs = (line.split(maxsplit=1) for line in sums.read_text().splitlines())
    return {name: sha256 for sha256, name in pairs}


def require(before: Mapping[str, str], source: Path) -> None:
    """Check that the files which a checkpoint was trained with are imported; import none.

    A file of the same name with other contents is accepted with a warning.

    Raises:
        UserError: A file is missing.
    """
    modules = {name: sys.modules.get(f"{PACKAGE}.{Path(name).stem}") for name in before}
    missing = [name for name, module in modules.items() if module is None]
    if missing:
        copies = [source / "imports" / name for name in missing]
        given = " ".join(f"--import {c if c.is_file() else c.name}" for c in copies)
        raise UserError(
            f"{source} was made with {', '.join(missing)}, which is never imported from a "
            f"checkpoint by itself; add {given} if you trust what is there"
        )
    for name, module in modules.items():
        if module is not None and module.sha256 != before[name]:
            logger.warning(
                "%s differs from the file that %s was made with", module.__file__, source
            )


def changes(before: Mapping[str, str], files: Iterable[Imported]) -> list[str]:
    """List the differences between imported files, as parts of a sentence.

    Args:
        before: Checksums by name, as `kept` returns them.
        files: The present files.
    """
    now = {file.name: file for file in files}
    found = [f"{name} is no longer imported" for name in before if name not in now]
    found += [f"{name} was not imported" for name in now if name not in before]
    found += [
        f"{now[name].path} is not the {name} that the run began with (SHA-256 {sha256[:12]}, now "
        f"{now[name].sha256[:12]})"
        for name, sha256 in before.items()
        if name in now and now[name].sha256 != sha256
    ]
    return found
