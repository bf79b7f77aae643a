"""Insert the table of the options, which is generated from the code, into its page."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace("OPTIONS_TABLE", options_table()) if "OPTIONS_TABLE" in markdown else markdown


def options_table() -> str:
    """Returns the table of the options of config.py, in order."""
    sys.path.insert(0, str(ROOT))
    from config import OPTIONS

    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option in OPTIONS:
        default = "" if option.default == "" else f"`{option.default}`"
        lines.append(f"| `{option.key}` | {default} | {option.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)
