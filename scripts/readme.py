"Write README.md from nbs/index.ipynb; with --check, only say whether it is up to date."
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

REPO = Path(__file__).resolve().parents[1]
TAGS = Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": ["hide"], "remove_input_tags": ["echo: false"]}})


def render(notebook: Path) -> str:
    "Markdown of a notebook without what its directives hide; links start from the top. SystemExit when it was not executed."
    nb = nbformat.read(notebook, 4)
    if any(c.cell_type == "code" and not c.outputs for c in nb.cells): sys.exit(f"{notebook.name} has a cell without output: execute it first")
    nb.metadata["language_info"] = {"name": "python"}
    for cell in nb.cells:
        cell.metadata["tags"] = re.findall(r"^#\|\s*(.+?)\s*$", cell.source, re.M)
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    text = MarkdownExporter(config=TAGS).from_notebook_node(nb)[0]
    text = re.sub(r"\]\((?:\.\./)+", "](", text)
    text = re.sub(r"\]\((?!https?:|#|/)([\w./-]+)", lambda m: "](" + _from_top(m[1]), text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _from_top(link: str) -> str:
    "A link from the top: what lies beside the index lies in nbs/."
    return link if (REPO/link).exists() or not (REPO/"nbs"/link).exists() else f"nbs/{link}"


def write(root: Path = REPO, check: bool = False) -> bool:
    "Bring README.md up to date; whether it was."
    new, readme = render(root/"nbs/index.ipynb"), root/"README.md"
    same = readme.exists() and readme.read_text(encoding="utf-8") == new
    if not same and not check: readme.write_text(new, encoding="utf-8")
    return same


if __name__ == "__main__":
    check = "--check" in sys.argv
    if not write(check=check) and check: sys.exit("README.md differs from nbs/index.ipynb: run `make sync`")
