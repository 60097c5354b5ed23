"""Generates pages of the documentation's site and checks all links; mkdocs loads this file.

    make docs        (mkdocs build --strict; the site is in site/)

The README is the first page. Commands, recipes and configuration keys are listed from the code
itself, so the lists are never out of date. Links between the project's files are changed to links
between the site's pages.
"""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PROJECT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(PROJECT))

from tetdist.config.documentation import documented_keys  # noqa: E402 - found by the line above
from tetdist_command import COMMANDS  # noqa: E402 - found by the same line

# Pages at the project's root, and what they are called on the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
RECIPES = "reference/recipes.md"
# The search ranks some pages low, since they would hide the page that explains a term. It ranks
# others high: training.md explains "resume" and "checkpoint", first_run.md "first run".
LOW = ("results/", "results.md", "performance.md", "exactness.md", RECIPES)
HIGH = {"training.md": 10, "reference/configuration.md": 3}
HIGH |= {"contributing.md": 2, "guides/first_run.md": 2}
# Words of questions that these pages answer in other words.
ASKED = {
    "training.md": ["change T", "lambda", "fewer"],
    "guides/imagenet.md": ["8 GPUs"],
    "kubernetes.md": ["two nodes without"],
    "metrics.md": ["logs", "W&B"],
}
SOURCE = "source"  # the folder of the pages that show linked code
# The text of a link may be an image.
_LINK = re.compile(r"(!?)\[((?:!\[[^\]]*\]\([^)]*\))?[^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_LOG = logging.getLogger("mkdocs.hooks.site")
_CODE = re.compile(r"^(```.*?^```)", flags=re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """List the pages of studies in the navigation."""
    pages = sorted(f"results/{page.name}" for page in (PROJECT / "docs" / "results").glob("*.md"))
    (measured,) = (entry["Measured"] for entry in config.nav or [] if "Measured" in entry)
    measured.insert(1, {"Results by study": pages})


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made = {site: (PROJECT / name).read_text() for name, site in ROOT_PAGES.items()}
    made["reference/commands.md"] = commands_page()
    made["reference/configuration.md"] = configuration_page()
    made[RECIPES] = recipes_page()
    made |= {_source_uri(path): source_page(path) for path in linked_code()}
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change links to the site's pages, except within code; rank pages in the search."""
    del config, files  # mkdocs hands them over by name
    uri = page.file.src_uri
    if uri.startswith("results/"):
        page.meta["hide"] = ["toc"]  # their tables need its place
    elif uri == "index.md":
        page.meta["hide"] = ["navigation"]  # it would list this page alone
    if uri.startswith(LOW):
        page.meta["search"] = {"boost": 0.01}
    elif uri in HIGH:
        page.meta["search"] = {"boost": HIGH[uri]}
    page.meta["tags"] = ASKED.get(uri, [])
    at_root = {site: Path() for site in ROOT_PAGES.values()}
    folder = at_root.get(uri, (Path("docs") / uri).parent)
    parts = _CODE.split(markdown)
    parts[::2] = [
        _LINK.sub(lambda link: _site_link(link, folder, uri), text) for text in parts[::2]
    ]
    return "".join(parts)


def _site_link(link: re.Match[str], folder: Path, uri: str) -> str:
    """Return a link from the project's ``folder`` as the page ``uri`` needs it."""
    image, text, target, anchor = link.groups(default="")
    text = _LINK.sub(lambda inner: _site_link(inner, folder, uri), text)
    if not target or "://" in target:
        return link[0]
    path = Path(os.path.normpath(folder / target))
    if str(path) in ROOT_PAGES:
        there = ROOT_PAGES[str(path)]
    elif path.is_relative_to("docs") and path.suffix:
        there = str(path.relative_to("docs"))
    elif path.is_relative_to("configs"):
        there, anchor = RECIPES, f"#{_anchor(path)}" if path.suffix else ""
    elif _is_code(path):
        there = _source_uri(path)
    elif (PROJECT / path).is_dir():
        return f"`{path}`"
    else:
        return link[0]  # mkdocs reports that it is broken
    return f"{image}[{text}]({os.path.relpath(there, Path(uri).parent)}{anchor})"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links of a notebook to pages, since mkdocs does not; drop its headings' signs.

    Files of docs/ that texts of the code name (recipes, help) become links, also within code.
    """
    del config, files
    if page.file.src_uri.startswith("reference/"):
        named = r'(?<![\w/"])docs/([\w/]+\.md(#[\w-]+)?)'
        html = re.sub(named, r'<a href="../\1">\g<0></a>', html)
    elif not page.file.src_uri.endswith(".ipynb"):
        return html

    def to_page(link: re.Match[str]) -> str:
        there = Path(page.file.src_uri).parent / link[1]
        folder = os.path.relpath(there.with_suffix(""), Path(page.file.dest_uri).parent)
        return f'href="{folder}/{link[2] or ""}"'

    html = re.sub(r'<a class="anchor-link".*?</a>', "", html)
    return re.sub(r'href="([^":#]+\.md)(#[^"]*)?"', to_page, html)


@event_priority(-100)  # after the search has written it
def on_post_build(config: MkDocsConfig) -> None:
    """Warn of broken links and of Markdown shown as text; a warning fails a strict build.

    mkdocs checks only links in Markdown, not those in notebooks and raw HTML. In the search's
    texts, write & itself, since nobody searches for W&amp;B.
    """
    site = Path(config.site_dir)
    index = site / "search" / "search_index.json"
    index.write_text(index.read_text().replace("&amp;", "&"))
    pages = {file: _Page(file.read_text()) for file in site.rglob("*.html")}
    for file, page in pages.items():
        if file == site / "404.html":
            continue  # Its links begin at the root, wherever that may be.
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            there = Path(os.path.normpath(file.parent / unquote(url.path))) if url.path else file
            there = there / "index.html" if there.is_dir() else there
            known = pages[there].anchors if there in pages else None
            if not there.exists() or (
                url.fragment and known and unquote(url.fragment) not in known
            ):
                _LOG.warning("%s: the link %s is broken", file.relative_to(site), link)
        for text in page.lists_in_text:
            name = file.relative_to(site)
            _LOG.warning("%s: a list needs an empty line before it, after: %s", name, text)


class _Page(HTMLParser):
    """The links and anchors of a page, and paragraphs that hold a list's Markdown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.lists_in_text: list[str] = []
        self._in_paragraph = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_paragraph = self._in_paragraph or tag == "p"
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name in ("id", "name"):
                self.anchors.add(value)

    def handle_endtag(self, tag: str) -> None:
        self._in_paragraph = self._in_paragraph and tag != "p"

    def handle_data(self, data: str) -> None:
        before, found, _ = data.partition("\n* ")
        if self._in_paragraph and found:
            self.lists_in_text.append(before.rpartition("\n")[2])


def _anchor(recipe: Path) -> str:
    return f"{recipe.parent.name}-{recipe.stem}" if recipe.parent.name != "configs" else recipe.stem


# --- linked code ---------------------------------------------------------------------------------


def linked_code() -> set[Path]:
    """Return the files of code to which a page has a link, relative to the project."""
    pages = [PROJECT / name for name in ROOT_PAGES] + list((PROJECT / "docs").rglob("*.md"))
    return {
        path
        for page in pages
        for link in _LINK.finditer(page.read_text())
        if _is_code(path := Path(os.path.normpath(page.relative_to(PROJECT).parent / link[3])))
    }


def _is_code(path: Path) -> bool:
    """Return whether a path of the project is a file that is not part of another page."""
    others = "docs", "configs", *ROOT_PAGES
    return (PROJECT / path).is_file() and path.parts[0] not in others


def _source_uri(path: Path) -> str:
    # mkdocs leaves out folders whose names begin with a dot.
    return f"{SOURCE}/{path}.md".replace("/.", "/")


def source_page(path: Path) -> str:
    """Return the page that shows a file; the search leaves it out."""
    code = (PROJECT / path).read_text().rstrip()
    head = f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n"
    return f"{head}````{path.suffix[1:]}\n{code}\n````\n"


# --- commands ------------------------------------------------------------------------------------


def commands_page() -> str:
    """Return the --help of each command and of each of its subcommands."""
    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(lambda name: list(_helps(name)), COMMANDS))
    lines = [
        "# Commands",
        "",
        "After this page you know every command and its options.",
        "",
        "In a checkout, run `python tools/COMMAND.py`, `python launch/slurm.py`,",
        "`python launch/torchrun.py` or `python tetdist/train.py`; with the installed package,",
        "`tetdist COMMAND`. Each has `--help`.",
        "",
        "| command | purpose |",
        "|---|---|",
        *(f"| [{name}](#{name}) | {text} |" for name, text in COMMANDS.items()),
    ]
    for name, helps in zip(COMMANDS, texts, strict=True):
        lines += ["", f"## {name} {{ #{name} }}"]
        for words, text in helps:
            lines += ["", f"### {name} {words}"] if words else []
            lines += ["", "```text", text.rstrip(), "```"]
    return "\n".join(lines)


def _helps(name: str) -> Iterator[tuple[str, str]]:
    """Yield the help of a command, then of each of its subcommands by its name."""
    text = _help(name)
    yield "", text
    inner = re.search(r"^  \{([a-z_,-]+)\}", text, flags=re.MULTILINE)
    for word in inner[1].split(",") if inner else []:
        yield word, _help(name, word)


def _help(*words: str) -> str:
    command = [sys.executable, "tetdist_command.py", *words, "--help"]
    shown = subprocess.run(
        command,
        cwd=PROJECT,
        env=os.environ | {"COLUMNS": "88", "NO_COLOR": "1"},
        text=True,
        capture_output=True,
        check=True,
    )
    return shown.stdout


# --- configuration -------------------------------------------------------------------------------


def configuration_page() -> str:
    """Return the page of all configuration keys, with a table for each section."""
    lines = [
        "# Configuration keys",
        "",
        "After this page you know every key, its allowed values and its default.",
        "",
        "Set keys in a YAML file, or override one on the command line with `key=value`. Keys are",
        "dotted, and items of a list are numbered from 0: `phases.0.epochs=10`. `--explain KEY`",
        "shows these texts in a terminal; `--print-config` shows the values of a run, and the file",
        "that sets each of them.",
    ]
    by_section: dict[str, list[str]] = {}
    for key, documented in documented_keys().items():
        section = key.rpartition(".")[0]
        meaning = " ".join(documented.meaning.split())
        default = documented.default.removeprefix("default").lstrip(": ")
        row = f"| `{key}` | {_cell(meaning)} | {_cell(documented.takes)} | {_cell(default)} |"
        by_section.setdefault(section, []).append(row)
    for section, rows in by_section.items():
        lines += ["", f"## {section or 'The run'}", ""]
        lines += ["| key | meaning | allowed values | default |", "|---|---|---|---|", *rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    for sign, shown in {"|": "\\|", "<": "&lt;", "*": "\\*", "{": "&#123;"}.items():
        text = text.replace(sign, shown)
    return text


# --- recipes -------------------------------------------------------------------------------------


def recipes_page() -> str:
    """Return the page of all recipes in configs/, with their headers."""
    lines = [
        "---\nhide: [toc]\n---",  # headers need its place
        "# Recipes",
        "",
        "After this page you can choose a recipe and know what it needs and reaches.",
        "",
        "The files of `configs/`, those for CPUs first. The header of each names its command,",
        "hardware and known results. `--config NAME.yaml` finds it from any folder.",
    ]
    folder = PROJECT / "configs"
    for title, found in [
        ("Runs", folder.glob("*.yaml")),
        ("Studies", (folder / "studies").glob("*.yaml")),
    ]:
        lines += ["", f"## {title} {{ #{title.lower()} }}", ""]
        lines += ["| recipe | purpose | hardware |", "|---|---|---|"]
        shown: list[str] = []
        for file in sorted(found, key=lambda file: (" CPU" not in _hardware(file), file)):
            text = file.read_text()
            name = yaml.safe_load(text).get("title", file.name)
            about, _, _ = text.partition("\n#\n")  # the first paragraph of the header
            about = " ".join(line.strip("# ") for line in about.splitlines())
            cells = f"[{name}](#{_anchor(file)})", _cell(about), _cell(_hardware(file))
            lines.append(f"| {' | '.join(cells)} |")
            shown += ["", f"### {name} {{ #{_anchor(file)} }}", ""]
            shown += [f'```yaml title="{file.relative_to(PROJECT)}"', text.rstrip(), "```"]
        lines += shown
    return "\n".join(lines)


def _hardware(recipe: Path) -> str:
    """Return the first sentence of a header's entry `hardware`; "" without one."""
    entry = re.search(r"^# hardware +(.*(?:\n#  +.*)*)", recipe.read_text(), flags=re.MULTILINE)
    whole = " ".join(line.strip("# ") for line in entry[1].splitlines()) if entry else ""
    return re.split(r"[;.] (?![^(]*\))|\.$", whole)[0]
