"""User plug-ins: imported files and the registries they extend.

A configuration's ``imports: [my_snn.py]``, or a command's ``--import my_snn.py``, imports a Python
file before the configuration is checked. The file registers models (with timm's
``register_model``), neurons, losses, optimisers, transforms and trackers, which then have names
like tetdist's own. docs/extending.md has an example of each.

An imported file is part of a run: a copy and its checksum are kept in the run's folder. A
checkpoint is data: it lists the imported files, and never imports any.
"""

import hashlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn, TypeVar, cast

from tetdist.errors import PeerFailed, UserError
from tetdist.storage.files import open_file, replacing, write_text
from tetdist.wording import meant, meant_path

logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E")

# The package of imported files: in one of them, `from tetdist_imports.helpers import ...` means the
# file helpers.py, which must be imported before it.
PACKAGE = "tetdist_imports"
CHECKSUMS = "SHA256SUMS"
# Of each module, the keys of the configuration that its entries are for.
_KEYS_OF: dict[str, set[str]] = {}


class Registry(dict[str, T]):
    """A table of entries by name, which imported files can extend.

    Args:
        what: The kind of its entries, in errors, such as ``loss``.
        key: The configuration's key for the names.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what, self.key = what, key
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Make a decorator that enters its object under ``name``, as `enter` does."""

        def enter(entry: E) -> E:
            self.enter(name, cast(T, entry), getattr(entry, "__module__", "?"))
            return entry

        return enter

    def enter(self, name: str, entry: T, module: str) -> None:
        """Enter an object of a module under ``name``.

        Raises:
            UserError: Another module has used that name.
        """
        owner = self._modules.setdefault(name, module)
        if owner != module:
            raise UserError(
                f"{module} registers the {self.what} {name!r}, which {owner} has registered; give "
                "it another name"
            )
        _KEYS_OF.setdefault(module, set()).add(self.key)
        self[name] = entry

    def __missing__(self, name: str) -> NoReturn:
        raise UserError(f"{self.key}: {none_of(self.what, name, self)}")


def none_of(what: str, name: str, known: Collection[str], otherwise: str | None = None) -> str:
    """Return the error for an unknown name: with a similar name, or ``otherwise``, or all."""
    own = "add its file: imports: [FILE.py], or --import FILE.py"
    if files := [Path(str(module.__file__)).name for module in imported_modules()]:
        own += f"; not registered in {', '.join(files)}"
    return f"there is no {what} {name!r}; {meant(name, known, otherwise)} (for your own, {own})"


class Imported(NamedTuple):
    """A file that was imported."""

    path: Path
    sha256: str


def import_files(paths: Iterable[str | Path]) -> list[Imported]:
    """Import files in order, except unchanged ones that are imported already.

    Raises:
        UserError: A file cannot be read, raises, or registers a used name; or two files have the
            same name.
    """
    imported: dict[str, Imported] = {}
    for path in map(Path, paths):
        if path.suffix != ".py" or not path.stem.isidentifier():
            raise UserError(f"imports: {path} must be a Python file named in one word: my_snn.py")
        try:
            with open_file(path) as stream:
                code = stream.read()
        except OSError as error:
            near = meant_path(path, "correct it", "*.py")
            raise UserError(f"imports: {path} cannot be read ({error.strerror}); {near}") from error
        file = Imported(path.absolute(), hashlib.sha256(code).hexdigest())
        if imported.setdefault(path.name, file).path != file.path:
            other = imported[path.name].path
            raise UserError(f"imports: {other} and {path} have the same name; rename one")
        _import(file, code)
    return list(imported.values())


def without_losses(paths: Iterable[str]) -> list[str]:
    """Leave out imported files that register losses alone: a trained network does not need them."""
    import timm

    return [
        path
        for path in paths
        if _KEYS_OF.get(f"{PACKAGE}.{(stem := Path(path).stem)}") != {"loss.kind"}
        or timm.list_models(module=stem)
    ]


def checksums_of(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the SHA-256 by name of imported files, as of when they were imported."""
    names = [Path(path).name for path in paths]
    return {name: sys.modules[f"{PACKAGE}.{Path(name).stem}"].sha256 for name in names}


def _import(file: Imported, code: bytes) -> None:
    import timm

    name = f"{PACKAGE}.{file.path.stem}"
    if getattr(sys.modules.get(name), "sha256", None) == file.sha256:
        return
    if PACKAGE not in sys.modules:
        sys.modules[PACKAGE] = package = ModuleType(PACKAGE)
        package.__path__ = []
    before = {model: timm.model_entrypoint(model) for model in timm.list_models()}
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(__file__=str(file.path), sha256=file.sha256)
    try:
        exec(compile(code, file.path, "exec"), vars(module))
        for model, made in before.items():
            if timm.model_entrypoint(model) is not made and made.__module__ != name:
                raise UserError(
                    f"imports: {file.path} registers the model {model!r}, which "
                    f"{made.__module__} has registered already; give it another name"
                )
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        hint = "; write @dataclass(frozen=True, kw_only=True)" if "non-frozen" in str(error) else ""
        if isinstance(error, ImportError) and file.path.with_name(f"{error.name}.py").is_file():
            hint = f"; import that file first, and write `from {PACKAGE}.{error.name} import ...`"
        raise UserError(f"imports: {raised_in(error, file.path)}{hint}") from error


def raised_in(error: BaseException, file: str | Path) -> str:
    """Return which line of a user's file raises an error, and the error, for messages."""
    frames = traceback.extract_tb(error.__traceback__)
    *_, line = 0, *(frame.lineno for frame in frames if Path(frame.filename) == Path(file))
    line = error.lineno if isinstance(error, SyntaxError) else line
    return f"{file}:{line} raises {type(error).__name__}: {error}"


def explained(error: Exception, folder: Path | None = None) -> Exception:
    """Turn an error that imported files may have caused into a `UserError`, after printing its
    frames in these files; return any other error as it is.

    Args:
        folder: Folder for the whole traceback, if it exists; otherwise a new temporary one.
    """
    modules, frames = imported_modules(), own_frames(error)
    known = isinstance(error, UserError | PeerFailed) or (isinstance(error, OSError) and not frames)
    if known or not modules:
        return error
    import timm

    lines = traceback.format_list(frames) + traceback.format_exception_only(error)
    print("".join(lines), end="", file=sys.stderr)
    if folder is None or not folder.is_dir():
        folder = Path(tempfile.mkdtemp(prefix=f"tetdist-{os.getuid()}-"))
    whole = folder / "traceback.txt"
    write_text(whole, "".join(traceback.format_exception(error)))
    parts = []
    for module in modules:
        if not frames or module.__file__ == frames[0].filename:
            file = Path(str(module.__file__))
            keys = sorted(_KEYS_OF.get(module.__name__, ()))
            keys += ["model.name"] if timm.list_models(module=file.stem) else []
            parts.append(f"{file} ({', '.join(keys)})" if keys else str(file))
    raises = f"raises {type(error).__name__}" if frames else "is in use, and may be the cause"
    return UserError(f"{', '.join(parts)} {raises}; {whole} has the whole traceback")


def imported_modules() -> list[ModuleType]:
    """Return the modules of imported files."""
    return [sys.modules[name] for name in sys.modules if name.startswith(f"{PACKAGE}.")]


def own_frames(error: Exception) -> list[traceback.FrameSummary]:
    """Return the frames of an error that are in imported files."""
    files = {module.__file__ for module in imported_modules()}
    return [one for one in traceback.extract_tb(error.__traceback__) if one.filename in files]


def keep(files: Iterable[Imported], folder: Path) -> tuple[str, ...]:
    """Copy imported files to a folder, with their checksums as ``sha256sum -c`` reads them.

    Returns:
        The copies' paths.
    """
    sums = {folder / file.path.name: file for file in files}
    if sums or folder.exists():  # it may hold files of a run that failed before it began
        folder.mkdir(parents=True, exist_ok=True)
        for copy, file in sums.items():
            with replacing(copy) as stream:
                stream.write(file.path.read_bytes())
        lines = (f"{file.sha256}  {copy.name}\n" for copy, file in sums.items())
        write_text(folder / CHECKSUMS, "".join(lines))
    return tuple(str(copy.absolute()) for copy in sums)


def require(before: Mapping[str, str], source: Path) -> None:
    """Check that the files which a checkpoint was trained with are imported; import none.

    A file of the same name with other contents is accepted with a warning.

    Raises:
        UserError: Files are missing; the text names all.
    """
    modules = {name: sys.modules.get(f"{PACKAGE}.{Path(name).stem}") for name in before}
    if missing := [name for name, module in modules.items() if module is None]:
        copies = {name: source / "imports" / name for name in missing}
        flags = (f"--import {copy if copy.is_file() else name}" for name, copy in copies.items())
        raise UserError(
            f"{source} was made with {', '.join(missing)}, which a checkpoint never imports by "
            f"itself; add {' '.join(flags)} if you trust the code"
        )
    for name, module in modules.items():
        if module is not None and module.sha256 != before[name]:
            logger.warning("%s differs from the file of %s", module.__file__, source)


def changes(folder: Path, files: Iterable[Imported]) -> list[str]:
    """List how files differ from those that `keep` copied to a folder, as parts of a sentence."""
    sums, now = folder / CHECKSUMS, {file.path.name: file for file in files}
    lines = sums.read_text().splitlines() if sums.is_file() else []
    before = {name: sha256 for sha256, name in (line.split(maxsplit=1) for line in lines)}
    differences = [f"{name} is no longer imported" for name in before if name not in now]
    for name, file in now.items():
        if name not in before:
            differences.append(f"{name} was not imported")
        elif file.sha256 != before[name]:
            differences.append(f"{file.path} is not the {name} that the run began with")
    return differences
