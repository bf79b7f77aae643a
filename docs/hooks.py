"""Make what is generated in the documentation: formulas, when the site is built, and the committed tables.

python docs/hooks.py    writes the tables of options.md and api.md anew
"""

import html
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

TABLE = re.compile(r"(?<=\n\n)\|.*\|\n(?:\|.*\|\n)+")  # the only one of its page
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Adds the docstrings of all names to the page of the API; called by mkdocs for each page."""
    if page.file.src_uri != "api.md":
        return markdown
    blocks = (f"::: {source.__module__}.{name}" for name, source in public_names().items())
    return "\n\n".join((markdown, *blocks))


def on_page_content(content: str, **_: Any) -> str:
    """Turns formulas into MathML, which browsers show without a script; called by mkdocs for each page."""
    return _FORMULA.sub(
        lambda found: convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline"), content
    )


def public_names() -> dict[str, Any]:
    """Returns the functions and classes of the package, and those that its users see as arguments and results."""
    import modules
    from modules.candidates import CandidateReranker, Reranker, Reranking
    from modules.search import SearchResult, merged

    others = (CandidateReranker, Reranker, Reranking, SearchResult, merged)
    sources = [*(getattr(modules, name) for name in modules.__all__), *others]
    return {each.__name__: each for each in sorted(sources, key=lambda each: (each.__module__, each.__name__))}


def api_table() -> str:
    """Returns the table of the names of the package, with the first sentence of their docstrings, and their files."""
    lines = ["| name | meaning | file |", "| --- | --- | --- |"]
    for name, source in public_names().items():
        first = " ".join((inspect.getdoc(source) or "").partition("\n\n")[0].split())
        first = re.sub(r":\w+:`~?([\w.]+)`", r"`\1`", first).replace("|", "\\|")
        lines.append(f"| `{name}` | {first} | `{source.__module__.replace('.', '/')}.py` |")
    return "\n".join(lines) + "\n"


def options_table() -> str:
    """Returns the table of the options of config.py, in order."""
    from config import OPTIONS

    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option in OPTIONS:
        default = "" if option.default == "" else f"`{option.default}`"
        lines.append(f"| `{option.key}` | {default} | {option.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


TABLES = {"options.md": options_table, "api.md": api_table}

if __name__ == "__main__":
    for name, table in TABLES.items():
        path = ROOT / "docs" / name
        before, after = TABLE.split(path.read_text())
        path.write_text(before + table() + after)
