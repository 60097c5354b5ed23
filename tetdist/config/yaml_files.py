"""Reads untrusted YAML into plain values: text, numbers, lists and mappings, nothing shared."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from tetdist.errors import UserError
from tetdist.storage.files import open_file


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Raises:
        UserError: It is no YAML, holds no mapping, or a key twice.
        OSError: The file cannot be read.
    """
    with open_file(path) as file:
        raw = _plain(file.read(), str(path))
    if not isinstance(raw, dict):
        kind = "but is empty" if raw is None else f"not a {type(raw).__name__}"
        raise UserError(f"{path} must hold keys and values, {kind}")
    return raw


def read_value(text: str, source: str) -> Any:
    """Parse a piece of YAML; errors name ``source``."""
    return _plain(text, source)


def _plain(stream: bytes | str, source: str) -> Any:
    try:
        loader = _Loader(stream if isinstance(stream, str) else stream.decode())
        loader.name = source  # which YAML's own errors name, too
        value = loader.get_single_data()
        # Through JSON, because YAML's aliases are one object at several places: an override of one
        # phase would change the others that are written as an alias of it.
        return json.loads(json.dumps(value, ensure_ascii=False).encode())
    except UserError:
        raise
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


def _plain_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str | int | float:
    """Construct a number; dates and 1:30, in YAML 1.1 a number of base 60, are text."""
    if ":" in node.value or node.tag.endswith("timestamp"):
        return str(node.value)
    is_int = node.tag == "tag:yaml.org,2002:int"
    return loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)


for _tag in ("int", "float", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _plain_scalar)
# YAML 1.1 takes 1e-4 for text. Such text is written in quotes.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"), _Loader, yaml.SafeDumper
)
