"""Tables of things known by a name, open to what comes from outside."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar, cast

from tetdist.errors import UserError

T = TypeVar("T")
E = TypeVar("E")


class Registry(Mapping[str, T], Generic[T]):
    """A table of what is known by a name.

    Args:
        what: What it holds, in errors, such as ``loss``.
        key: The configuration's key that takes the names.
    """

    def __init__(self, what: str, key: str) -> None:
        self.what, self.key = what, key
        self._entries: dict[str, T] = {}
        self._modules: dict[str, str] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """Make a decorator that enters what it decorates under ``name``."""

        def enter(entry: E) -> E:
            self.enter(name, cast(T, entry), getattr(entry, "__module__", "?"))
            return entry

        return enter

    def enter(self, name: str, entry: T, module: str) -> None:
        """Enter something under ``name``, from a module.

        Raises:
            UserError: Another module has entered something under that name.
        """
        if self._modules.get(name, module) != module:
            raise UserError(
                f"{module} registers the {self.what} {name!r}, which {self._modules[name]} has "
                "registered; give it another name"
            )
        self._entries[name], self._modules[name] = entry, module

    def __getitem__(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UserError: There is none.
        """
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise UserError(f"{self.key}: there is no {self.what} {name!r}; there are {known}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
