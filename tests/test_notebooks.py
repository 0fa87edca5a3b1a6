"What holds for all notebooks and modules at once, and what importing the package costs."
import ast
import configparser
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from nsnet.study import parameters_of

REPO = Path(__file__).resolve().parents[1]
COMPONENTS = sorted((REPO/"nbs").glob("[0-9]*.ipynb"))
STUDIES = sorted((REPO/"nbs/studies").glob("*.ipynb"))
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in COMPONENTS}
LEAVES = {"images", "patches", "nullspace", "losses", "metrics", "counts"}
LATE = {"shell", "cli", "study"}   # import where they need it, so that --help answers at once
MODULES = [p for p in sorted((REPO/"nsnet").glob("*.py")) if p.name != "_modidx.py"]
by_name = dict(ids=lambda path: path.stem)


def imported(source):
    "Modules of the package that a source imports, and where: at the top or inside a function."
    tree = ast.parse(source)
    top = {id(n) for n in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "nsnet"):
            home = (node.module or "").removeprefix("nsnet").strip(".")
            for name in [home] if home else [a.name for a in node.names]: yield name, id(node) in top
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith("nsnet."): yield a.name.removeprefix("nsnet."), id(node) in top


def defined(module):
    "Names of a module that do not begin with an underscore, as nbdev lists them."
    assigned = [n for n in ast.parse(module.read_text()).body if isinstance(n, ast.Assign)]
    return next((ast.literal_eval(n.value) for n in assigned if n.targets[0].id == "__all__"), [])


def exported(notebook):
    "The exported cells of a notebook."
    return [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" and re.search(r"^#\|\s*export", c.source, re.M)]


@pytest.mark.parametrize("notebook", COMPONENTS, **by_name)
def test_component_opens_as_all_do(notebook):
    cells = nbformat.read(notebook, 4).cells
    if notebook != COMPONENTS[0]:
        assert cells[0].source == f"#| default_exp {notebook.stem[3:]}"
        assert re.match(r"# .+\n\n> .+", cells[1].source)
        assert cells[2].cell_type == "markdown" or "#| export" in cells[2].source
    assert any(c.get("outputs") for c in cells), "committed without having been executed"


def test_no_two_notebooks_export_to_one_module():
    "nbdev lets the last one win and says nothing."
    sources = [c.source for n in sorted((REPO/"nbs").rglob("*.ipynb")) for c in nbformat.read(n, 4).cells]
    homes = [m[1] for s in sources if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", s, re.M))]
    assert len(homes) == len(set(homes)) and set(homes) == set(NUMBER) - {"overview"}
    assert set(homes) == {m.stem for m in MODULES[1:]}


def test_readme_shows_the_committed_table():
    assert (REPO/"reports/table1-full/summary.md").read_text().strip() in (REPO/"README.md").read_text()


def test_links_lead_somewhere():
    "From where each file lies: notebooks, README and the reports' index."
    for file in [*COMPONENTS, *STUDIES, REPO/"nbs/index.ipynb", REPO/"README.md", REPO/"reports/README.md"]:
        text = file.read_text() if file.suffix == ".md" else "\n".join(c.source for c in nbformat.read(file, 4).cells if c.cell_type == "markdown")
        for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text): assert (file.parent/link.partition("#")[0]).exists(), f"{file.name}: {link}"


def test_every_arrow_of_the_import_graph_points_down():
    "A module imports from lower numbers, at the top but for the command, and nothing in a circle; the leaves import nothing."
    for module in MODULES[1:]:
        for name, at_top in imported(module.read_text()):
            assert at_top or module.stem in LATE, f"{module.stem} imports {name} inside a function"
            assert module.stem not in LEAVES and NUMBER[name] < NUMBER[module.stem], f"{module.stem} imports {name}"


def test_figures_and_tables_load_no_torch():
    for name in ("config", "figures", "report"):
        reached = [name]
        for one in reached: reached += [n for n, _ in imported((REPO/f"nsnet/{one}.py").read_text()) if n not in reached]
        for one in reached: assert not re.search(r"^(import|from) torch", (REPO/f"nsnet/{one}.py").read_text(), re.M), f"{name}: {one}"


def test_overview_exports_nothing():
    assert COMPONENTS[0].stem == "00_overview" and not exported(COMPONENTS[0])


@pytest.mark.parametrize("module", MODULES, **by_name)
def test_module_can_be_held_in_the_head(module):
    source = module.read_text()
    written = re.sub(r"^__all__ = \[.*?\]$", "", source, flags=re.M | re.S)           # nbdev wraps this one as it likes
    assert not [line for line in written.splitlines() if len(line) > 120]
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [n.name for n in functions if n.end_lineno - n.lineno >= 30]
    assert (lines := source.count("\n")) <= 300, lines


def test_the_whole_is_small():
    assert (lines := sum(m.read_text().count("\n") for m in MODULES)) < 7700, lines
    assert (names := sum(len(defined(m)) for m in MODULES[1:])) <= 235, names


def test_no_notebook_is_large():
    for notebook in [*(REPO/"nbs").rglob("*.ipynb"), *(REPO/"reports").rglob("*.ipynb")]:
        if ".ipynb_checkpoints" not in notebook.parts: assert notebook.stat().st_size <= 600_000, notebook.relative_to(REPO)


@pytest.mark.parametrize("notebook", COMPONENTS, **by_name)
def test_exported_code_needs_no_authoring_tool(notebook):
    for source in exported(notebook): assert not re.search(r"^\s*(import|from) (fastcore|nbdev)", source, re.M)


@pytest.mark.parametrize("notebook", STUDIES, **by_name)
def test_study_has_typed_and_commented_parameters(notebook):
    "Without the tag, which cleaning can remove, papermill runs the defaults and says nothing."
    parameters = papermill.inspect_notebook(str(notebook))
    assert parameters and "out" in parameters
    source = next(c.source for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", []))
    lines = [line for line in source.splitlines() if not line.startswith("#")]
    assert set(parameters) == {line.partition(":")[0] for line in lines}       # papermill leaves out what it cannot parse
    for name, p in parameters.items():
        assert p["inferred_type_name"] in ("str", "int", "float", "bool"), f"{name} has no type"
        assert p["help"].strip(), f"{name} has no comment"
    ours = {name: (p.type.__name__, str(p.default), p.help) for name, p in parameters_of(notebook).items()}
    assert ours == {name: (p["inferred_type_name"], str(ast.literal_eval(p["default"])), p["help"])
                    for name, p in parameters.items()}, "papermill reads them otherwise"


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


def python(code):
    "What an interpreter of its own prints."
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def test_studies_leave_to_the_preset_with_none():
    "No 0, -1 or empty text that means unset."
    for notebook in STUDIES:
        for name, p in papermill.inspect_notebook(str(notebook)).items():
            assert p["default"] not in ('""', "''") and not p["default"].startswith("-"), f"{notebook.stem}: {name}"


def test_import_is_cheap():
    code = "import sys, nsnet; print([m for m in ('torch', 'transformers', 'kaggle', 'papermill', 'matplotlib', 'pandas') if m in sys.modules])"
    assert python(code) == "[]"
    code = "import time; start = time.perf_counter(); import nsnet; print(time.perf_counter() - start)"
    assert statistics.median(float(python(code)) for _ in range(3)) < .2


def test_public_names_exist():
    import nsnet
    for name in nsnet.__all__: assert callable(getattr(nsnet, name))
    with pytest.raises(AttributeError, match="advanced"): nsnet.advanced
