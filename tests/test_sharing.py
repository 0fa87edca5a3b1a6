"The files that others need to cite the project, to change it and to run its workflows."
import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((REPO/".github/workflows").glob("*.yml"))
by_name = dict(ids=lambda path: path.stem)


@pytest.fixture
def settings():
    file = configparser.ConfigParser()
    file.read(REPO/"settings.ini")
    return file["DEFAULT"]


def test_citation_agrees_with_the_settings_and_names_the_paper(settings):
    cite = yaml.safe_load((REPO/"CITATION.cff").read_text(encoding="utf-8"))
    assert cite["cff-version"] == "1.2.0" and cite["type"] == "software" and cite["message"]
    assert cite["title"] == settings["lib_name"] and str(cite["version"]) == settings["version"]
    assert cite["license"] == settings["license"] and cite["repository-code"] == settings["git_url"]
    assert [a["name"] for a in cite["authors"]] == [settings["author"]]
    assert ", ".join(cite["keywords"]) == settings["keywords"]
    paper, readme = cite["preferred-citation"], (REPO/"README.md").read_text(encoding="utf-8")
    assert paper["title"] in readme and ", ".join(a["family-names"] for a in paper["authors"]) in readme
    assert cite["references"][0]["identifiers"][0]["value"] in readme


def test_what_contributing_names_is_there():
    "Files it links to, commands of the Makefile, tables to add to: in the notebook that it says."
    text = (REPO/"CONTRIBUTING.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text): assert (REPO/link).exists(), link
    make = (REPO/"Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"make ([a-z-]+)", text): assert re.search(rf"^(\S+ )*{goal}( \S+)*:", make, re.M), goal
    for test in re.findall(r"tests/\w+\.py", text): assert (REPO/test).exists(), test
    tables = re.findall(r"^\| [^|]+ \| `(\w+)` in \[\w+\]\((\S+)\)", text, re.M)
    assert len(tables) >= 4
    for name, notebook in tables: assert f'"{name} = ' in (REPO/notebook).read_text(encoding="utf-8") \
        or f'"{name}[' in (REPO/notebook).read_text(encoding="utf-8"), f"{notebook} has no table {name}"


@pytest.mark.parametrize("workflow", WORKFLOWS, **by_name)
def test_workflow_asks_for_little(workflow):
    "Reading alone unless a job says more; releases of actions are pinned; no job runs for ever."
    steps = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert steps["permissions"] == {"contents": "read"} and steps["concurrency"]["group"]
    for job in steps["jobs"].values():
        assert job["timeout-minutes"] <= 180
        for step in job["steps"]: assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_workflows_are_there(): assert {w.stem for w in WORKFLOWS} == {"tests", "site"}


@pytest.mark.parametrize("workflow", WORKFLOWS, **by_name)
def test_workflow_is_valid(workflow):
    if not shutil.which("actionlint"): pytest.skip("actionlint is not installed")
    said = subprocess.run(["actionlint", workflow], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout
