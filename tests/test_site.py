"The site of the notebooks: built once as `make docs` builds it, then read."
import ast
import importlib
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

for needed in ("sphinx", "myst_nb", "furo", "latex2mathml"): pytest.importorskip(needed, reason="pip install '.[docs]'")

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO/"scripts"))
import api  # noqa: E402
import pages  # noqa: E402

COMPONENTS = sorted((REPO/"nbs").glob("[0-9]*.ipynb"))
PUBLIC = {p.stem: api.Module(p).public for p in sorted((REPO/"nsnet").glob("*.py")) if not p.name.startswith("_")}


class Page(HTMLParser):
    "What a page links to, what it loads by itself, and its anchors."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.anchors |= {a.get("id"), a.get("name")} - {None}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload", "manifest"): self.loads.append(a["href"])
        if a.get("src"): self.loads.append(a["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Where the pages are laid out, and the HTML made of them."
    folder = tmp_path_factory.mktemp("site")
    pages.Site(REPO, folder/"laid").lay_out()
    made = pages.html(folder/"laid", folder/"html", capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder/"laid", folder/"html"


@pytest.fixture(scope="module")
def read(site):
    return {p.relative_to(site[1]): Page(p) for p in sorted(site[1].rglob("*.html"))}


def test_every_notebook_and_report_has_a_page(site):
    _, html = site
    reports = [p for pages_ in pages.Site(REPO, html).reports for p in pages_ if p.suffix == ".ipynb"]
    assert len(reports) >= 9
    for notebook in [*COMPONENTS, *sorted((REPO/"nbs/studies").glob("*.ipynb")), *reports]:
        page = (html/notebook.relative_to(REPO)).with_suffix(".html").read_text(encoding="utf-8")
        assert "#|" not in re.sub(r"<[^>]+>", "", page), f"{notebook.name} shows a directive"
    assert "_images/method.svg" in (html/"index.html").read_text(encoding="utf-8")


def test_sidebar_lists_the_notebooks_in_reading_order(site):
    _, html = site
    front = (html/"index.html").read_text(encoding="utf-8")
    listed = re.findall(r'class="reference internal" href="nbs/(\d\d_\w+)\.html"', front[:front.index("<article")])
    assert listed == [p.stem for p in COMPONENTS]
    assert "Begin here" in front and pages.PARTS["captions"] in front


@pytest.mark.parametrize("notebook", COMPONENTS, ids=lambda path: path.stem)
def test_outputs_are_those_that_are_committed(site, notebook):
    "As many figures and tables as are stored where nothing hides them, each figure with a word for who cannot see it."
    page = (site[1]/f"nbs/{notebook.stem}.html").read_text(encoding="utf-8")
    shown = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" and "hide" not in pages.directives(c)]
    stored = [output.get("data", {}) for c in shown for output in c.outputs]
    pictures = re.findall(r'<img alt="[^"]+" src="[^"]*/[0-9a-f]{64}\.', page)
    assert len(pictures) == sum(any(kind.startswith("image/") for kind in data) for data in stored)
    tables = '<table border="1" class="dataframe"'
    assert page.count(tables) == sum(data.get("text/html", "").count(tables) for data in stored)


def test_formulas_are_drawn_by_the_browser(site):
    page = (site[1]/"nbs/13_nullspace.html").read_text(encoding="utf-8")
    assert page.count("<math") > 50 and "<span>(16)</span>" in page and "\\lVert" not in page


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(site, module):
    _, html = site
    page = Page(html/f"api/{module}.html")
    assert {f"nsnet.{module}.{name}" for name in PUBLIC[module]} <= page.anchors
    notebook = next(p.stem for p in COMPONENTS if p.stem[3:] == module)
    there = {link.partition("#")[2] for link in page.links if link.startswith(f"../nbs/{notebook}.html#")}
    assert len(there) == len(PUBLIC[module]), "each name links to its own cell"


@pytest.mark.parametrize("module", PUBLIC)
def test_docments_are_those_that_nbdev_reads(module):
    "Comments of parameters and results, by the library that defines what a docment is."
    docments = pytest.importorskip("fastcore.docments").docments
    m, loaded = api.Module(REPO/f"nsnet/{module}.py"), importlib.import_module(f"nsnet.{module}")
    functions = [name for name in m.public if isinstance(m.definitions[name], ast.FunctionDef)]
    for name in functions:    # what is returned has other names there
        theirs = {n: says or "" for n, says in docments(getattr(loaded, name), args_kwargs=True).items()}
        theirs["returns"] = theirs.pop("return", "")
        ours = {"returns": ""} | {n.lstrip("*"): says for n, _, _, says in m.parameters(m.definitions[name])}
        assert ours == theirs, name


def test_reference_shows_signature_type_default_and_comment(site):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (site[1]/"api/nullspace.html").read_text(encoding="utf-8")))
    assert "project_per_sample ( u , m , eps = 1e-8 )" in text
    assert "eps float 1e-8 floor of the squared length of m" in text
    assert "returns Tensor (B, d): each row of u without its part along the same row of m" in text


def test_search_knows_words_and_names(site):
    index = (site[1]/"searchindex.js").read_text(encoding="utf-8")
    index = json.loads(index[index.index("(") + 1:index.rindex(")")])
    assert "wilson" in index["terms"] and "Null space" in index["titles"]
    assert {"nsnet.nullspace", "nsnet.detector"} <= set(index["objects"])


def test_every_link_and_picture_leads_somewhere(site, read):
    "In the HTML itself, outputs of notebooks included, down to the anchor."
    _, html = site
    for name, page in read.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or not link.strip("#"): continue
            path = (html/name.parent/unquote(parts.path)).resolve() if parts.path else html/name
            assert path.exists(), f"{name}: {link}"
            if parts.fragment and path.suffix == ".html":
                assert unquote(parts.fragment) in read[path.relative_to(html)].anchors, f"{name}: {link}"


def test_nothing_is_loaded_from_elsewhere(site, read):
    "No script, style, font or picture: the site works without a network."
    for name, page in read.items(): assert not [u for u in page.loads if re.match(r"(https?:)?//", u)], name
    for style in site[1].rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


BROKEN = {"99_nowhere.ipynb": "[a notebook](99_nowhere.ipynb)",
          "No-such-heading": "[a heading](15_model.ipynb#No-such-heading)", "none.png": "![a figure](images/none.png)",
          "none.md": "[a report](../reports/table1-full/none.md)",
          "none.csv": "[data](../reports/table1-full/none.csv)", "nsnet.model.Nobody": "{py:obj}`nsnet.model.Nobody`"}


def test_broken_links_make_the_build_fail(site):
    "One of each kind, in a notebook that was laid out: all are named."
    laid, html = site
    html = shutil.copytree(html, html.with_name("broken"))
    path = laid/"nbs/12_lora.ipynb"
    kept = path.read_text(encoding="utf-8")
    nb = nbformat.reads(kept, 4)
    nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(BROKEN.values())))
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    made = pages.html(laid, html, capture_output=True, text=True)
    path.write_text(kept, encoding="utf-8")
    assert made.returncode != 0
    for target in BROKEN: assert target in made.stderr, made.stderr


def test_a_link_to_code_leads_to_the_repository(site):
    "Files that have no page, from the address in settings.ini."
    made = pages.Site(REPO, site[0])
    def linked(text): return made.linked(text, REPO/"nbs/index.ipynb")
    assert linked("[a](../scripts/sync.py)") == f"[a]({made.address}/blob/main/scripts/sync.py)"
    assert linked("[a](studies)") == f"[a]({made.address}/tree/main/nbs/studies)"
    assert linked("[a](13_nullspace.ipynb#x)") == "[a](13_nullspace.ipynb#x)"
