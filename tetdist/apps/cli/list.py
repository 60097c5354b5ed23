"""List the names that a configuration may use: `tetdist list`."""

import textwrap
from collections.abc import Iterable

from tetdist.apps.cli.common import program
from tetdist.config.flags import Parser


def main(arguments: list[str] | None = None) -> int:
    Parser(prog=program("list"), description=__doc__).parse_args(arguments)
    from tetdist.config.loading import CONFIGS_DIR
    from tetdist.config.names import LOSSES, NETWORKS, OPTIMIZERS
    from tetdist.nn.neurons import NEURONS
    from tetdist.storage import bundled

    print("recipes (train --config NAME):")
    for file in sorted(CONFIGS_DIR.glob("*.yaml")):
        first, _, _ = file.read_text().partition("\n")
        print(f"  {file.name:26} {textwrap.shorten(first.strip('# '), 90, placeholder=' ...')}")
    known: dict[str, Iterable[str]] = {
        "networks (model.name)": NETWORKS,
        "trained networks (eval NAME, init_checkpoint)": bundled.names(),
        "neurons (model.neuron.kind)": NEURONS,
        "losses (loss.kind)": LOSSES,
        "optimisers (phases.*.optimizer.kind), and timm's as timm:NAME": OPTIMIZERS,
    }
    for title, names in known.items():
        print(f"\n{title}:")
        print(textwrap.indent(textwrap.fill(", ".join(names), 98), "  "))
    return 0
