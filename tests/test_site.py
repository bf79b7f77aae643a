"""The documentation as it is read: generated tables, diagrams, and the built site in a browser without network."""

import html
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # builds the site and opens it in a browser

DOCS = ROOT / "docs"


@pytest.mark.parametrize("name", ["options.md", "api.md"])
def test_the_committed_tables_are_up_to_date(name, monkeypatch):
    pytest.importorskip("latex2mathml", reason="the tables are written by docs/hooks.py")
    monkeypatch.syspath_prepend(DOCS)
    import hooks

    (table,) = hooks.TABLE.findall((DOCS / name).read_text())
    assert table == hooks.TABLES[name](), "run python docs/hooks.py"


def test_the_diagrams_show_their_sources():
    for source in DOCS.glob("*.dot"):
        drawn = html.unescape(source.with_suffix(".svg").read_text())
        for label in re.findall(r'label="([^"]+)"', source.read_text()):
            assert all(f">{line}<" in drawn for line in label.split("\\n")), f"dot -Tsvg {source} > {source.stem}.svg"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of the built site."""
    pytest.importorskip("mkdocs", reason="the site needs docs/requirements.txt")
    if sys.version_info < (3, 11):
        pytest.skip("the last mkdocstrings for Python 3.10 fails with today's pymdown-extensions")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--no-directory-urls", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(page for page in folder.rglob("*.html") if page.name != "404.html")


def test_every_page_of_the_site_can_be_read_offline(pages, browser):
    context, asked = browser.new_context(), []
    context.route(re.compile("https?:"), lambda route: (asked.append(route.request.url), route.abort()))
    page, formulas = context.new_page(), 0
    for path in pages:
        page.goto(path.as_uri())
        text = page.locator("article").inner_text()
        prose = page.evaluate("""() => {
            const copy = document.querySelector("article").cloneNode(true)
            copy.querySelectorAll("code, math").forEach(each => each.remove())
            return copy.innerText
        }""")
        broken = page.evaluate("[...document.images].filter(each => !each.naturalWidth).map(each => each.src)")
        assert len(text) > 500, path.name
        assert re.findall(r"\\[(\[]|\$|:::|^\s*flowchart|\\\w+\{", prose, re.MULTILINE) == [], path.name
        assert (broken, page.locator(".mermaid, .language-mermaid").count()) == ([], 0), path.name
        formulas += page.locator("math").count()
    assert asked == []
    assert formulas > 5
