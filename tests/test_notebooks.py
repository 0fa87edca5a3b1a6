"What holds for all notebooks at once, and what importing the package costs."
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

REPO = Path(__file__).resolve().parents[1]
COMPONENTS = sorted((REPO/"nbs").glob("[0-9]*.ipynb"))
STUDIES = sorted((REPO/"nbs/studies").glob("*.ipynb"))
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in COMPONENTS}
LEAVES = {"images", "patches", "nullspace", "losses", "metrics"}
by_name = dict(ids=lambda path: path.stem)


def imported(source):
    "Modules of the package that a source imports, and where: at the top or inside a function."
    tree = ast.parse(source)
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("nsnet")):
            home = (node.module or "").removeprefix("nsnet").strip(".")
            for name in [home] if home else [a.name for a in node.names]: yield name, id(node) in top


def exported(notebook):
    "The exported cells of a notebook."
    return [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" and re.search(r"^#\|\s*export", c.source, re.M)]


@pytest.mark.parametrize("notebook", COMPONENTS, **by_name)
def test_component_opens_as_all_do(notebook):
    cells = nbformat.read(notebook, 4).cells
    assert f"#| default_exp {notebook.stem[3:]}" in cells[0].source
    assert re.match(r"# .+\n\n> .+", cells[1].source)
    assert cells[2].cell_type == "markdown" or "#| export" in cells[2].source
    assert any(c.get("outputs") for c in cells), "committed without having been executed"


def test_no_two_notebooks_export_to_one_module():
    "nbdev lets the last one win and says nothing."
    sources = [c.source for n in sorted((REPO/"nbs").rglob("*.ipynb")) for c in nbformat.read(n, 4).cells]
    homes = [m[1] for s in sources if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
    assert len(homes) == len(set(homes)) and set(homes) == set(NUMBER)


def test_readme_shows_the_committed_table():
    assert (REPO/"reports/table1-full/summary.md").read_text().strip() in (REPO/"README.md").read_text()


def test_links_lead_somewhere():
    "From where each file lies: notebooks, README and the reports' index."
    for file in [*COMPONENTS, *STUDIES, REPO/"nbs/index.ipynb", REPO/"README.md", REPO/"reports/README.md"]:
        text = file.read_text() if file.suffix == ".md" else "\n".join(c.source for c in nbformat.read(file, 4).cells if c.cell_type == "markdown")
        for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text): assert (file.parent/link).exists(), f"{file.name}: {link}"


@pytest.mark.parametrize("notebook", COMPONENTS, **by_name)
def test_component_imports_only_what_comes_before_it(notebook):
    module = notebook.stem[3:]
    for name, at_top in imported((REPO/f"nsnet/{module}.py").read_text()):
        if name not in NUMBER: continue
        assert module not in LEAVES, f"{module} imports {name}"
        assert NUMBER[name] < NUMBER[module] or ((module, name) == ("train", "detect") and not at_top), f"{module} imports {name}"


@pytest.mark.parametrize("notebook", COMPONENTS, **by_name)
def test_exported_code_needs_no_authoring_tool(notebook):
    for source in exported(notebook): assert not re.search(r"^\s*(import|from) (fastcore|nbdev)", source, re.M)


@pytest.mark.parametrize("notebook", STUDIES, **by_name)
def test_study_has_typed_and_commented_parameters(notebook):
    "Without the tag, which cleaning can remove, papermill runs the defaults and says nothing."
    parameters = papermill.inspect_notebook(str(notebook))
    assert parameters and "out" in parameters
    source = next(c.source for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    assert set(parameters) == {line.partition(":")[0] for line in source.splitlines()}       # papermill leaves out what it cannot parse
    for name, p in parameters.items():
        assert p["inferred_type_name"] in ("str", "int", "float", "bool"), f"{name} has no type"
        assert p["help"].strip(), f"{name} has no comment"


@pytest.mark.parametrize("notebook", [*COMPONENTS, *STUDIES], **by_name)
def test_stored_outputs_are_clean(notebook):
    "No path of the machine that ran it, no warning, no error."
    for cell in nbformat.read(notebook, 4).cells:
        for output in cell.get("outputs", []):
            text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
            assert output.output_type != "error" and "Warning" not in text, cell.source
            assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|content)/", text), cell.source


def test_versions_agree():
    settings = configparser.ConfigParser()
    settings.read(REPO/"settings.ini")
    import nsnet
    assert settings["DEFAULT"]["version"] == nsnet.__version__


def test_import_is_cheap():
    code = "import sys, nsnet; print([m for m in ('torch', 'transformers', 'kaggle', 'papermill', 'matplotlib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_public_names_exist():
    import nsnet
    for name in nsnet.__all__: assert callable(getattr(nsnet, name))
    with pytest.raises(AttributeError, match="advanced"): nsnet.advanced
