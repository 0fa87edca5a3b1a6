"The built wheel works in an environment of its own, far from the checkout."
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "nsnet", "nbs/studies")


def run(*command, **options):
    "Run a command and return what it printed; its words on failure."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the sources."
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source, target = REPO/name, folder/"source"/name
        if source.is_dir(): shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists(): target.parent.mkdir(exist_ok=True), shutil.copy(source, target)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder/"source")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "An environment with the wheel; the libraries it needs are borrowed from this one, the checkout is not."
    venv = tmp_path_factory.mktemp("clean")/"venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    site = next((venv/"lib").glob("python*"))/"site-packages"
    (site/"borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(sys.executable, "-m", "pip", "--python", venv/"bin/python", "install", "--no-deps", "--no-index", wheel)
    return venv/"bin/python"


@pytest.fixture
def away(tmp_path, monkeypatch):
    "An empty current folder, and nothing that points at the checkout."
    for name in ("PYTHONPATH", "VIRTUAL_ENV"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def test_package_stands_alone(installed, away):
    where = run(installed, "-c", "import nsnet; print(nsnet.__file__)", cwd=away).strip()
    assert Path(where).is_relative_to(installed.parents[1])
    found = run(installed, "-c", "from nsnet.storage import asset; from nsnet.study import find_study; print(find_study('table1'), asset('clip'), asset('blip'))", cwd=away)
    assert all(Path(path).is_relative_to(Path(where).parent) for path in found.split())


def test_import_is_cheap(installed, away):
    heavy = "torch", "transformers", "kaggle", "papermill", "matplotlib"
    assert run(installed, "-c", f"import sys, nsnet; print([m for m in {heavy} if m in sys.modules], nsnet.__version__)", cwd=away).split()[0] == "[]"


def test_wheel_carries_assets_and_studies(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    committed = run("git", "ls-files", "nsnet/assets", cwd=REPO).split() if (REPO/".git").exists() else []
    assert names >= {f"nsnet/studies/{p.name}" for p in (REPO/"nbs/studies").glob("*.ipynb")} | set(committed)
    assert any(name.startswith("nsnet/assets/mini/") for name in names)


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < 30e6


def test_study_runs_from_the_wheel(installed, away):
    settings = dict(systems="linear_probe,no_projection,advanced", out="out", data="data")
    options = [word for name, value in settings.items() for word in ("-p", name, value)]
    out = run(installed.with_name("nsnet"), "study", "table1", *options, cwd=away)
    assert "table1.ipynb" in out
    assert {"table1.csv", "scores.csv", "table1.ipynb"} <= {p.name for p in (away/"out").iterdir()}
    assert str(REPO) not in (away/"out/table1.ipynb").read_text()


def test_command_scores_from_the_wheel(installed, away):
    "The first thing somebody does who has installed it: pictures of their own, and a table."
    wild = REPO.parent/"shared/wild/real"
    if not wild.is_dir(): pytest.skip("the folder shared/wild with real pictures is not beside this checkout")
    head, *rows = run(installed.with_name("nsnet"), "score", wild, cwd=away).splitlines()
    assert head.split() == ["verdict", "probability", "path", "note"] and len(rows) > 10 and not list(away.iterdir())


@pytest.mark.parametrize("preset, more", [(None, dict(rule="resize", side=96)), pytest.param("mini", {}, marks=pytest.mark.slow)])
def test_plain_papermill_runs_table1_from_the_wheel(preset, more, installed, away):
    "As the README says it, far from the checkout: no download, no GPU, and the table and figures in the notebook."
    where = Path(run(installed, "-c", "from nsnet.study import find_study; print(find_study('table1'))", cwd=away).strip())
    settings = dict(preset=preset, systems="advanced,linear_probe", out="out") | more
    options = [word for name, value in settings.items() for word in ("-p", name, value)]
    run(installed, "-m", "papermill", where, "executed.ipynb", "-k", "python3", *options, cwd=away)
    assert {"table1.csv", "scores.csv", "summary.md", "run.json"} <= {p.name for p in (away/"out").iterdir()}
    cells = [c for c in nbformat.read(away/"executed.ipynb", 4).cells if c.cell_type == "code"]
    shown = [o for c in cells for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in shown) >= 8
    assert any("| advanced |" in str(o.get("data", {}).get("text/markdown")) for o in shown)
    assert "OWNER" not in str(shown) and not any(o.output_type == "error" for o in shown)


def test_colab_gets_what_it_needs():
    "Badge, guarded installation, and all of Colab's own modules behind a condition."
    cells = nbformat.read(REPO/"nbs/studies/table1.ipynb", 4).cells
    assert re.match(r"\[!\[Open in Colab\].+/github/[\w.-]+/nsnet/blob/main/nbs/studies/table1.ipynb\)", cells[0].source)
    install = next(c.source for c in cells if c.source.startswith("!"))
    assert install.startswith("! [ -e /content ] && pip install") and "git+https://github.com/" in install
    for cell in cells:
        if cell.cell_type == "code" and "from google.colab" in cell.source: assert "if p.drive:" in cell.source


def test_colab_refuses_before_anything_slow(installed, away, monkeypatch):
    "In Colab the preset is the paper's experiment, and without a GPU it says at once what to do."
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = "from nsnet import run_study; run_study('table1', out='out', progress=False)"
    done = subprocess.run([installed, "-c", code], cwd=away, capture_output=True, text=True)
    assert "no GPU: choose one under Runtime" in done.stderr and not (away/"data").exists()
    assert "ViT-L-14/openai" in str(nbformat.read(away/"out/table1.failed.ipynb", 4).cells)
