"""List the names that a configuration may use, or one kind of them: `tetdist list neurons`."""

import textwrap
from collections.abc import Iterable
from itertools import takewhile

from tetdist.apps.cli.common import program
from tetdist.config.flags import Parser
from tetdist.config.loading import CONFIGS_DIR
from tetdist.config.names import LOSSES, NETWORKS, OPTIMIZERS
from tetdist.nn.neurons import NEURONS
from tetdist.storage import bundled


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog=program("list"), description=__doc__)
    kinds = ["recipes", "networks", "trained", "neurons", "losses", "optimisers"]
    parser.add_argument("kind", nargs="?", choices=kinds, metavar="KIND", help=", ".join(kinds))
    kind = parser.parse_args(arguments).kind or ""
    recipes: list[str] = []
    for file in sorted(CONFIGS_DIR.glob("*.yaml")):
        lines = takewhile(lambda line: line != "#", file.read_text().splitlines())
        about = " ".join(line.strip("# ") for line in lines)
        row = textwrap.wrap(about, 70, break_on_hyphens=False)
        recipes.append(f"{file.name:26} " + f"\n{'':27}".join(row))
    known: dict[str, Iterable[str]] = {
        "networks (model.name)": NETWORKS,
        "trained networks (eval NAME, init_checkpoint)": bundled.names(),
        "neurons (model.neuron.kind)": NEURONS,
        "losses (loss.kind)": LOSSES,
        "optimisers (phases.*.optimizer.kind), and timm's as timm:NAME": OPTIMIZERS,
    }
    filled = {title: textwrap.fill(", ".join(names), 98) for title, names in known.items()}
    texts = {"recipes (train --config NAME)": "\n".join(recipes)} | filled
    shown = [title for title in texts if title.startswith(kind)]
    print("\n\n".join(f"{title}:\n{textwrap.indent(texts[title], '  ')}" for title in shown))
    return 0
