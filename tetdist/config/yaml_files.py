"""Reads untrusted YAML into plain values: text, numbers, lists and mappings, nothing shared."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tetdist.errors import UserError
from tetdist.storage.files import open_file

# Of one file or override. Reading as much takes some seconds.
MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS = 200_000, 20_000, 50


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        UserError: It is no YAML, holds no mapping, or a key twice.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        raw = _plain(file.read(MOST_CHARACTERS + 1), str(path))
    if not isinstance(raw, dict):
        kind = "but is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {kind}")
    return raw


def read_value(text: str, source: str) -> Any:
    """Parse a piece of YAML; errors name ``source``."""
    return _plain(text, source)


def _plain(stream: bytes | str, source: str) -> Any:
    try:
        if len(stream) > MOST_CHARACTERS:
            raise OverflowError
        loader = _Loader(stream if isinstance(stream, str) else stream.decode())
        loader.name = source  # which YAML's own errors name, too
        value = loader.get_single_data()
        # Through JSON, because YAML's aliases are one object at several places: an override of one
        # phase would change the others that are written as an alias of it.
        return json.loads(json.dumps(value, ensure_ascii=False).encode())
    except UserError:
        raise
    except (OverflowError, RecursionError) as error:
        raise UserError(
            f"{source} has more than {MOST_CHARACTERS:,} characters, {MOST_VALUES:,} values (an "
            f"alias counts as what it stands for) or {MOST_LEVELS} levels; make it smaller"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.context_mark or error.problem_mark  # the first of both
        text = f"line {mark.line + 1 if mark else 0}: {error.problem}"
        tabs = "; indent by spaces" if "\\t" in text else ""
        raise UserError(f"{source} is not valid YAML: {text}{tabs}") from error
    # TypeError: a set; ValueError: a number of ten thousand digits, bytes that are no text.
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses repeated keys, of which YAML's own silently keeps the last."""

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
                    f"{key.start_mark.name}: the key {key.value!r} appears twice, in lines "
                    f"{lines[key.value]} and {line}; rename or remove one"
                )
            lines[key.value] = line
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        """Construct what is not too large: a few aliases of aliases stand for a billion values."""
        left, number = [(node, 0)], 0
        while left:
            part, level = left.pop()
            number += 1
            if number > MOST_VALUES or level > MOST_LEVELS:
                raise OverflowError
            if isinstance(part, yaml.MappingNode):
                left += [(value, level + 1) for pair in part.value for value in pair]
            elif isinstance(part, yaml.SequenceNode):
                left += [(value, level + 1) for value in part.value]
        return super().construct_document(node)


def _plain_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | int | float:
    """Construct a decimal number; dates and 1:30, in YAML 1.1 a number of base 60, are text."""
    if ":" in node.value or node.tag.endswith("timestamp"):
        return str(node.value)
    if node.tag != "tag:yaml.org,2002:int":
        return loader.construct_yaml_float(node)
    number = loader.construct_yaml_int(node)
    if re.match(r"[-+]?0.", node.value):
        raise UserError(
            f"{node.start_mark.name}: {node.value} is {number} in YAML; write a decimal number "
            "without a leading 0, or put quotes around text"
        )
    return number


for _tag in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _plain_scalar)
# YAML 1.1 takes 1e-4 for text. Such text is written in quotes.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"), _Loader, yaml.SafeDumper
)
