"""The parser of commands that take a configuration and ``key=value``."""

import re
from argparse import Namespace

from tetdist.config.flags import Parser


class KeyParser(Parser):
    """A parser that names the key of the configuration for a flag such as ``--epochs``."""

    def meant(self, flag: str) -> str:
        from tetdist.config.documentation import documented_keys
        from tetdist.config.messages import nearest
        from tetdist.config.schema import RunConfig

        words = flag.strip("-").replace("-", "_").split(".")
        is_key = any(words[-1] in key.split(".") for key in documented_keys())
        if not is_key and (known := super().meant(flag)):
            return known
        near = nearest(RunConfig, words).partition("known keys")[0].rstrip()
        near = re.sub(r"'([\w.]+)'", r"\1=VALUE", near) or "`train --explain` lists them"
        return f"keys of the configuration have no --; {near}"

    def add_config(self) -> None:
        """Add ``--config``, which `require_config` checks."""
        about = "YAML file, or its name in configs/"
        self.add_argument("--config", metavar="NAME", action="append", help=about)

    def require_config(self, options: Namespace) -> None:
        """Exit unless one configuration is given; a file's name without its flag is a mistake."""
        if not options.config:
            name = next((one for one in options.overrides if "=" not in one), None)
            hint = f"write --config {name}" if name else "give a YAML file, or its name in configs/"
            self.error(f"--config is missing; {hint}")
        if len(options.config) > 1:
            names = " and as ".join(options.config)
            self.error(f"--config is given twice, as {names}; leave out one")
        (options.config,) = options.config
