"""Faults made on purpose: a line of a function is replaced in its source, for a while."""

import contextlib
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def faulty(where: str, line: str, instead: str) -> Iterator[None]:
    """A context in which a function has another line.

    Args:
        where: Its place, ``module:Class.function``.
        line: Text that its source has once.
        instead: What it has in place of that.
    """
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, module)
    function = inspect.unwrap(inspect.getattr_static(owner, name))
    lines, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(lines))
    assert source.count(line) == 1, f"{where} has {line!r} {source.count(line)} times"
    made: dict[str, Any] = {}
    # With its line numbers; whoever has imported the function has its code changed, too.
    text = "\n" * (first - 1) + source.replace(line, instead)
    exec(compile(text, str(module.__file__), "exec"), vars(module), made)
    code, function.__code__ = function.__code__, inspect.unwrap(made[name]).__code__
    try:
        yield
    finally:
        function.__code__ = code
