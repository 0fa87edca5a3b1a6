"Write the modules and README.md anew from the notebooks; with --check, do it in a copy and fail when anything differs."
import filecmp
import re
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
COPIED = ("pyproject.toml", "settings.ini", "README.md", "CITATION.cff", "nbs", "nsnet", "scripts")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "assets")


def address(root: Path) -> None:
    "Write the repository's address, which stands in settings.ini alone, into badges, install cells and the citation."
    settings = ConfigParser()
    settings.read(root/"settings.ini")
    owner = settings["DEFAULT"]["git_url"].removeprefix("https://github.com/")
    for file in [*(root/"nbs").rglob("*.ipynb"), root/"CITATION.cff"]:
        old = file.read_text(encoding="utf-8")
        new = re.sub(r"(github\.com|research\.google\.com/github)/[\w.-]+/nsnet\b", rf"\1/{owner}", old)
        if new != old: file.write_text(new, encoding="utf-8")


def generate(root: Path) -> None:
    "Remove every generated module of a checkout, draw the diagram, export and clean all notebooks, render the README."
    address(root)
    for module in (root/"nsnet").glob("*.py"):
        if module.name != "__init__.py": module.unlink()
    subprocess.run([sys.executable, root/"scripts/diagram.py", root/"nbs/images/method.svg"], check=True)
    for command in ("nbdev-export", "nbdev-clean"): subprocess.run([command], cwd=root, check=True)
    subprocess.run([sys.executable, root/"scripts/readme.py"], cwd=root, check=True)


def files(root: Path) -> set[Path]:
    "Notebooks, the diagram, modules, the citation and the README of a checkout."
    found = {p.relative_to(root) for part in ("nbs", "nsnet") for p in (root/part).rglob("*") if p.suffix in (".ipynb", ".py", ".svg")}
    return {p for p in found if ".ipynb_checkpoints" not in p.parts} | {Path("README.md"), Path("CITATION.cff")}


def differing() -> list[str]:
    "What would change if everything were generated anew."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "checkout")
        copy.mkdir()
        for name in COPIED:
            source = REPO/name
            if source.is_dir(): shutil.copytree(source, copy/name, ignore=LEFT_OUT)
            elif source.exists(): shutil.copy(source, copy/name)
        generate(copy)
        same = lambda p: (REPO/p).exists() and (copy/p).exists() and filecmp.cmp(REPO/p, copy/p, shallow=False)
        return sorted(str(p) for p in files(REPO) | files(copy) if not same(p))


if __name__ == "__main__":
    if "--check" not in sys.argv: generate(REPO)
    elif changed := differing(): sys.exit("not in step with the notebooks (run `make sync`): " + ", ".join(changed))
