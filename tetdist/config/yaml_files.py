"""Reads YAML of strangers into plain values: text, numbers, lists and mappings, nothing shared."""

import json
from pathlib import Path
from typing import Any

import yaml

from tetdist.errors import UserError
from tetdist.storage.files import open_file

# Anchors may make a small file stand for any number of values; no configuration has so many.
_MOST_VALUES = 100_000
# PyYAML reads some 100,000 bytes a second.
_MOST_BYTES = 2**19


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys and values of a YAML file.

    Raises:
        UserError: It is no YAML, holds something else, a key twice, or anchors without an end.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        raw = _plain(file.read(_MOST_BYTES + 1), str(path))
    if not isinstance(raw, dict):
        found = "and is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {found}")
    return raw


def read_value(text: str, source: str) -> Any:
    """The value that a piece of YAML stands for; ``source`` is named in errors.

    Raises:
        UserError: As of `read_yaml`.
    """
    return _plain(text, source)


def _plain(stream: bytes | str, source: str) -> Any:
    if len(stream) > _MOST_BYTES:
        raise UserError(
            f"{source} is larger than {_MOST_BYTES:,} bytes, which no configuration is; see that "
            "it is the right file"
        )
    try:
        loader = _Loader(stream if isinstance(stream, str) else stream.decode())
        loader.name = source  # which YAML's own errors name, too
        value = loader.get_single_data()
        # Through JSON, because YAML's aliases are one object at several places: an override of one
        # phase would change the others that are written as an alias of it.
        return json.loads(json.dumps(value, ensure_ascii=False).encode())
    except UserError:
        raise
    except TypeError as error:
        raise UserError(
            f"{source}: a value is neither text, number, list nor mapping ({error}); "
            "quote it if it is meant as text"
        ) from error
    except RecursionError as error:
        raise UserError(f"{source} is not valid YAML here: it is nested too deeply") from error
    # ValueError: the 13th month, a number of ten thousand digits, bytes that are no text.
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Refuses what YAML's own safe loader takes: a key that is there twice, of which it keeps the
    last and says nothing, and anchors that stand for very many values, or contain themselves."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {}, set())
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here the keys are still those of the file; `<<` has merged nothing into them yet.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise UserError(
                    f"{key.start_mark.name}: the key {key.value!r} is there twice, in lines "
                    f"{lines[key.value]} and {line}; rename or remove one"
                )
            lines[key.value] = line
        return node


def _plain_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """Construct a number, but none of base 60, as which YAML 1.1 reads 1:30.

    Raises:
        UserError: It is one.
    """
    if ":" in node.value:
        line = node.start_mark.line + 1
        raise UserError(
            f"{node.start_mark.name}: {node.value} in line {line} is a number of base 60 to YAML "
            "1.1; write it as a decimal, or quote it if it is meant as text"
        )
    is_int = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _plain_number)


def _size(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """The number of values that a node stands for when every alias is written out.

    Args:
        node: The node.
        sizes: Those of the nodes that were counted, by their identity: each is counted once.
        inside: The nodes that this one is a part of.

    Raises:
        UserError: It contains itself, or stands for too many.
    """
    identity = id(node)
    source, line = node.start_mark.name, node.start_mark.line + 1
    if identity in inside:
        raise UserError(
            f"{source}: the anchor in line {line} contains an alias of itself, which has no end; "
            "write out what is meant"
        )
    if identity not in sizes:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        inside.add(identity)
        sizes[identity] = 1 + sum(_size(part, sizes, inside) for part in parts)
        inside.remove(identity)
    if sizes[identity] > _MOST_VALUES:
        raise UserError(
            f"{source}: with its aliases written out, line {line} stands for more than "
            f"{_MOST_VALUES:,} values; use fewer anchors"
        )
    return sizes[identity]
