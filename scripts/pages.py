"""Build the site of the notebooks into _site/: every notebook and report as it is committed, the API from the docments.

Nothing is executed and nothing is fetched. A broken link, or any other warning of Sphinx, makes the build fail."""
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat

import api

REPO = Path(__file__).resolve().parents[1]
# The parts of the house, each by its first module: the notebooks that follow belong to it
PARTS = dict(overview="Begin here", images="Ground floor", index="Data", scenes="Mini world", captions="Method",
             metrics="Detector", figures="Study", export="Use", page="Use")
PROJECT = ("CONTRIBUTING.md", "SECURITY.md")
REPORTS = {"table1": "table1-full"}    # a study whose committed report has another name
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")
BADGE = re.compile(r"\[!\[([^]]*)\]\(https://[^)]*\)\]")
TITLE = re.compile(r"^# (.+)$", re.M)


def anchor(title: str) -> str:
    "The anchor of a heading, as Jupyter names it."
    return title.strip().replace(" ", "-")


def toctree(pages: list[str], caption: str = "") -> str:
    "Pages for the sidebar."
    return "\n".join(["", "```{toctree}", ":hidden:", *[f":caption: {caption}"]*bool(caption), "", *pages, "```", ""])


def directives(cell) -> set[str]:
    "What the `#|` lines of a code cell say."
    return set(re.findall(r"^#\|\s*(\w+)", cell.source, re.M)) if cell.cell_type == "code" else set()


class Site:
    "The pages of a checkout, laid out for Sphinx in a folder of their own, each where it is in the repository."
    def __init__(self, root: Path, folder: Path):
        settings = ConfigParser()
        settings.read(root/"settings.ini")
        self.root, self.folder, self.address = root.resolve(), folder, settings["DEFAULT"]["git_url"]
        self.components = sorted((self.root/"nbs").glob("[0-9]*.ipynb"))
        self.studies = sorted((self.root/"nbs/studies").glob("*.ipynb"))
        self.reports = [pages for p in sorted((self.root/"reports").iterdir()) if (pages := self.inside(p))]
        self.executed = {p for report in self.reports for p in report if p.suffix == ".ipynb"}
        self.project = [p for name in PROJECT if (p := self.root/name).exists()]
        self.pages = {*self.components, *self.studies, *self.project, *sum(self.reports, [])}
        self.pages.add(self.root/"reports/README.md")

    def inside(self, report: Path) -> list[Path]:
        "The pages of a report, unless git ignores it: the executed notebook, where there is one, then its tables."
        ignored = (self.root/".gitignore").read_text(encoding="utf-8").splitlines()
        if not report.is_dir() or f"reports/{report.name}/" in ignored: return []
        notebooks = [p for p in report.glob("[!.]*.ipynb") if ".failed." not in p.name]
        return [*sorted(notebooks), *sorted(report.glob("*.md"))]

    def named(self, path: Path) -> Path:
        "A file under the name of its page: a table that is called like its notebook gets another one."
        twin = path.suffix == ".md" and path.with_suffix(".ipynb") in self.executed
        return path.with_stem(f"{path.stem}-table") if twin else path

    def place(self, path: Path) -> Path:
        "Where a file of the repository goes."
        place = self.folder/self.named(path).relative_to(self.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def web(self, path: Path) -> str:
        "A file's address in the repository."
        return f"{self.address}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(self.root)}"

    def linked(self, text: str, page: Path) -> str:
        "A page's text with links that work on the site: pictures and data are copied, all else is in the repository."
        home = self.root/"nbs/studies" if page in self.executed else page.parent    # where it was written
        def lead(link):
            path = (home/link[1]).resolve()
            if not path.exists(): return link[1]
            if path not in self.pages:
                if path.is_dir() or not {"reports", "images"} & {p.name for p in path.parents}: return self.web(path)
                shutil.copy(path, self.place(path))
            return os.path.relpath(self.named(path), page.parent)
        return LINK.sub(lead, BADGE.sub(r"[\1]", text))

    def read(self, path: Path) -> str: return self.linked(path.read_text(encoding="utf-8"), path)

    def about(self, path: Path) -> str:
        "The line under a notebook's title: where it is, and where to go on."
        line, module = f"[{path.name}]({self.web(path)})", path.stem[3:]
        if path in self.components:
            return line + f" · [nsnet.{module}](../api/{module}.md)"*(self.root/f"nsnet/{module}.py").exists()
        if path in self.executed: return f"{line}, executed · [the study](../../nbs/studies/{path.name})"
        report = self.root/"reports"/REPORTS.get(path.stem, path.stem)/path.name
        return f"{line}, not executed" + f" · [report](../../{report.relative_to(self.root)})"*(report in self.pages)

    def cells(self, path: Path, cells: list):
        "The cells that no directive hides, with a target before each exported definition."
        title, heading = rf"# {'Report: '*(path in self.executed)}\1\n\n{self.about(path)}", path.stem
        for cell in cells:
            if {"hide", "default_exp"} & (says := directives(cell)): continue
            if cell.cell_type == "markdown":
                cell.source = TITLE.sub(title, self.linked(cell.source, path), count=1)
                heading = [heading, *re.findall(r"^#+ (.+)$", cell.source, re.M)][-1]
            else: cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
            if "export" in says:
                cell.metadata["tags"] = ["export"]
                for name in api.names(cell.source):
                    yield nbformat.v4.new_markdown_cell(f"({api.target(path.stem[3:], name)})=")
            cell.metadata["mystnb"] = {"image": {"alt": heading}}
            for data in (output.get("data", {}) for output in cell.get("outputs", [])):
                if "text/markdown" in data: data["text/markdown"] = self.linked(data["text/markdown"], path)
            yield cell

    def notebook(self, path: Path, tables: list[Path] = ()) -> None:
        "Write a notebook's page; a report's tables stand below it in the sidebar."
        nb = nbformat.read(path, 4)
        nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
        nb.cells = list(self.cells(path, nb.cells))
        if tables: nb.cells.append(nbformat.v4.new_markdown_cell(toctree([self.named(p).stem for p in tables])))
        self.place(path).write_text(nbformat.writes(nb), encoding="utf-8")

    def markdown(self, path: Path, more: str = "") -> None:
        "Write a text's page; tables that are pasted elsewhere get a title."
        text = self.read(path)
        title = "" if re.match(r"\s*# ", text) else f"# {path.parent.name}: {path.stem}\n\n"
        self.place(path).write_text(title + text + more, encoding="utf-8")

    def front(self) -> str:
        "The front page, which is README.md and so nbs/index.ipynb, with the list of all pages."
        parts, part = {}, ""
        for path in self.components:
            part = PARTS.get(path.stem[3:], part)
            title = next(m[1] for c in nbformat.read(path, 4).cells if (m := TITLE.search(c.source)))
            parts.setdefault(part, []).append(f"{path.stem[:2]} {title} <nbs/{path.stem}>")
        parts["Studies"] = [f"nbs/studies/{p.stem}" for p in self.studies]
        parts["Reports"] = ["What the studies found <reports/README>"]
        parts["Reference"] = ["api", *(p.stem for p in self.project)]
        return self.read(self.root/"README.md") + "".join(toctree(pages, part) for part, pages in parts.items())

    def lay_out(self) -> None:
        "Write all pages."
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in [*self.components, *self.studies]: self.notebook(path)
        for first, *tables in self.reports:
            if first in self.executed: self.notebook(first, tables)
            else: self.markdown(first, toctree([p.stem for p in tables])*bool(tables))
            for path in tables: self.markdown(path)
        for path in self.project: self.markdown(path)
        self.markdown(self.root/"reports/README.md", toctree([f"{r[0].parent.name}/{r[0].stem}" for r in self.reports]))
        (self.folder/"index.md").write_text(self.front(), encoding="utf-8")
        api.write(self.root/"nsnet", self.folder/"api", {p.stem[3:]: f"../nbs/{p.name}" for p in self.components})


def html(folder: Path, out: Path, **run) -> subprocess.CompletedProcess:
    "Let Sphinx make HTML of a folder; every warning is printed, and one is enough to fail."
    strict = "--nitpicky", "--fail-on-warning", "--keep-going", "--quiet"
    command = [sys.executable, "-m", "sphinx", "-c", REPO/"docs", "-d", f"{folder}.doctrees", *strict, folder, out]
    return subprocess.run(command, **run)


if __name__ == "__main__":
    work, site = REPO/"build/site", REPO/"_site"
    for old in (work, site): shutil.rmtree(old, ignore_errors=True)
    Site(REPO, work/"pages").lay_out()
    if html(work/"pages", work/"html").returncode: sys.exit("the site has broken links or other faults, listed above")
    (work/"html").rename(site)
    print(f"{sum(1 for _ in site.rglob('*.html'))} pages: {site.name}/index.html")
