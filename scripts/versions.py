"""Run the system tests in a new environment, with the lowest versions of the libraries that settings.ini names or with the newest there are.

    python scripts/versions.py lowest|newest [python3.13]

Writes a column of reports/versions/versions.csv. The environment is made under the temporary folder and removed again; it takes 6 GB.
"""
import os
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

import pandas as pd

REPO = Path(__file__).resolve().parents[1]
REPORT = REPO/"reports/versions/versions.csv"
NEED_DEV_TOOLS = ("tests/test_install.py", "tests/test_notebooks.py")


def run(*command, **options):
    "What a command prints; its words as an error when it fails."
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode: sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    return done.stdout


def environment(folder, interpreter, resolution):
    "A new environment with this checkout in it; its interpreter."
    run(interpreter, "-m", "venv", folder)
    python = folder/"bin/python"
    run(python, "-m", "pip", "install", "uv")
    run(folder/"bin/uv", "pip", "install", "--python", python, "--resolution", resolution, "--editable", REPO, "pytest>=8")
    run(python, "-m", "ipykernel", "install", "--sys-prefix")
    return python


def column(python):
    "The versions that were chosen, and the closing line of the tests."
    settings = ConfigParser()
    settings.read(REPO/"settings.ini")
    names = [r.partition(">=")[0] for r in settings["DEFAULT"]["requirements"].split()]
    asked = f"import platform, importlib.metadata as m; print(platform.python_version(), *(m.version(n) for n in {names}))"
    found = pd.Series(run(python, "-c", asked).split(), index=["python", *names])
    env = dict(os.environ, PATH=f"{python.parent}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    said = run(python, "-m", "pytest", "-q", *(f"--ignore={t}" for t in NEED_DEV_TOOLS), cwd=REPO, env=env)
    found["tests"] = said.strip().splitlines()[-1].partition(" in ")[0]
    return found


def main(which="", interpreter=sys.executable):
    if which not in ("lowest", "newest"): sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        found = column(environment(Path(folder), interpreter, dict(lowest="lowest-direct", newest="highest")[which]))
    table = pd.read_csv(REPORT, index_col=0, dtype=str) if REPORT.exists() else pd.DataFrame()
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    table.reindex(found.index).assign(**{which: found}).sort_index(axis=1).to_csv(REPORT, index_label="package", lineterminator="\n")
    print(found.to_string())


if __name__ == "__main__": main(*sys.argv[1:])
