"The API reference in Markdown, a page for each module, read from the source without importing it."
import ast
import io
import re
import tokenize
from pathlib import Path

HEADER = ("parameter", "type", "default", "meaning")
LONGEST = 40    # lines of a constant's value that are shown
Rows = list[tuple[str, str, str, str]]


def names(source: str) -> list[str]:
    "The public names that a piece of code defines."
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): found.append(node.name)
        if isinstance(node, ast.Assign): found += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return [name for name in found if not name.startswith("_")]


def target(module: str, name: str) -> str:
    "What links call the cell that defines a name; they do not tell capitals, so a name with one says that it has it."
    return f"defined.{module}.{name}" + ".capital"*name[0].isupper()


def assigned(tree: ast.Module, name: str) -> ast.AST:
    "The value that a module gives to a name."
    return next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == name)


class Module:
    "A module's source with its comments."
    def __init__(self, path: Path):
        self.name, self.source = path.stem, path.read_text(encoding="utf-8")
        tree = ast.parse(self.source)
        tokens = tokenize.generate_tokens(io.StringIO(self.source).readline)
        self.comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        self.about, self.public = ast.get_docstring(tree) or "", ast.literal_eval(assigned(tree, "__all__"))
        self.definitions = {name: node for node in tree.body for name in names(ast.unparse(node))}

    def code(self, node: ast.AST | None) -> str:
        "The source of a node, on one line."
        return " ".join(ast.get_source_segment(self.source, node).split()) if node else ""

    def parameters(self, function: ast.FunctionDef) -> Rows:
        "Name, type, default and comment of parameters and result; a comment is about the last of them on its line."
        a, given = function.args, []
        positional = [*a.posonlyargs, *a.args]
        defaults = dict(zip(reversed(positional), reversed(a.defaults))) | dict(zip(a.kwonlyargs, a.kw_defaults))
        for p in filter(None, (*positional, a.vararg, *a.kwonlyargs, a.kwarg)):
            stars = "*"*(p is a.vararg) or "**"*(p is a.kwarg)
            if p.arg not in ("self", "cls"): given.append((stars + p.arg, p.annotation, defaults.get(p), p))
        if self.code(function.returns) not in ("", "None"):
            given.append(("returns", function.returns, None, function.returns))
        last = {(default or p).end_lineno: name for name, _, default, p in given}
        says = {name: self.comments.get(line, "") for line, name in last.items() if line < function.body[0].lineno}
        return [(name, self.code(kind), self.code(default), says.get(name, "")) for name, kind, default, _ in given]

    def fields(self, owner: ast.ClassDef) -> Rows:
        "What makes an instance: the parameters of `__init__`, or the fields of a dataclass or named tuple."
        for n in owner.body:
            if isinstance(n, ast.FunctionDef) and n.name == "__init__": return self.parameters(n)
        return [(n.target.id, self.code(n.annotation), self.code(n.value), self.comments.get(n.end_lineno, ""))
                for n in owner.body if isinstance(n, ast.AnnAssign)]


def signature(rows: Rows, only_by_name: int = 0) -> str:
    "Names and defaults: the types stand in the table. So many of the last parameters are given by name only."
    shown = [name + f"={default}"*bool(default) for name, _, default, _ in rows if name != "returns"]
    if only_by_name: shown.insert(-only_by_name, "*")
    return f"({', '.join(shown)})"


def entry(kind: str, title: str, *content: str, fence: str = "````") -> str:
    "A definition and what is said of it; inside another one the fence is shorter."
    return "\n\n".join(filter(None, (f"{fence}{{py:{kind}}} {title}", *content, fence)))


class Reference:
    "The modules of a package, whose texts link to each other's definitions."
    def __init__(self, package: Path):
        self.package = package.name
        self.modules = {p.stem: Module(p) for p in sorted(package.glob("*.py")) if not p.name.startswith("_")}
        self.homes = {name: m.name for m in self.modules.values() for name in m.public}
        self.capital = re.compile(rf"\b({'|'.join(n for n in self.homes if n[0].isupper())})\b")

    def link(self, name: str, text: str) -> str:
        return f"{{py:obj}}`{text} <{self.package}.{self.homes[name]}.{name}>`"

    def kind(self, code: str) -> str:
        "A type, in which the package's own classes are links."
        parts = enumerate(self.capital.split(code.strip('"')))
        return " ".join(self.link(p, p) if i % 2 else f"`{p.strip()}`" for i, p in parts if p.strip())

    def text(self, plain: str) -> str:
        "A comment or docstring: plain text, but what stands in backticks is code, and a link where it is public."
        def code(part): return self.link(name, part) if (name := part.rpartition(".")[2]) in self.homes else f"`{part}`"
        def escaped(part): return re.sub(r"([\\*_<>$\[\]{}#~])", r"\\\1", part)
        return "".join(code(p) if i % 2 else escaped(p) for i, p in enumerate(plain.split("`")))

    def doc(self, node: ast.AST) -> str: return self.text(ast.get_docstring(node) or "")

    def table(self, rows: Rows) -> str:
        "Parameters, without the columns in which nothing stands; nothing at all where there are only names."
        if not any(kind or says for _, kind, _, says in rows): return ""
        rows = [("*returns*" if name == "returns" else f"`{name}`", self.kind(kind), f"`{default}`"*bool(default),
                 self.text(says)) for name, kind, default, says in rows]
        kept = [i for i in range(len(HEADER)) if any(row[i] for row in rows)]
        lines = [HEADER, ["---"]*len(HEADER), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
        return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)

    def function(self, m: Module, node: ast.FunctionDef, where: str = "", kind: str = "function", **fence) -> str:
        "A function or a method."
        how = {m.code(d) for d in node.decorator_list} & {"classmethod", "staticmethod", "property"}
        rows, by_name = m.parameters(node), 0 if node.args.vararg else len(node.args.kwonlyargs)
        if by_name and node.args.kwarg: by_name += 1
        title = node.name + signature(rows, by_name)*(how != {"property"})
        return entry(*(how or {kind}), title, self.doc(node) + where, self.table(rows), **fence)

    def klass(self, m: Module, node: ast.ClassDef, where: str) -> str:
        "A class, what makes an instance, and the methods that say what they do."
        rows = m.fields(node)
        said = [n for n in node.body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
        public = [n for n in said if n.name[0] != "_" or n.name == "__call__"]
        methods = [self.function(m, n, kind="method", fence="```") for n in public]
        title = node.name + signature(rows)*bool(rows)
        return entry("class", title, self.doc(node) + where, self.table(rows), *methods)

    def definition(self, m: Module, name: str) -> str:
        "A public name. Of a constant the value is shown, unless it is long."
        node, where = m.definitions[name], f" [(notebook)](#{target(m.name, name)})"
        if isinstance(node, ast.FunctionDef): return self.function(m, node, where)
        if isinstance(node, ast.ClassDef): return self.klass(m, node, where)
        value = ast.get_source_segment(m.source, node)
        return entry("data", name, f"```python\n{value}\n```"*(value.count("\n") < LONGEST), where)

    def page(self, name: str, notebook: str) -> str:
        "A module: what it is for, and every public name in the order in which its notebook defines them."
        m, full = self.modules[name], f"{self.package}.{name}"
        opening = f"# {full}\n\n{self.text(m.about)}\n\nExplained and tested in [{Path(notebook).name}]({notebook})."
        return "\n\n".join([opening, f"```{{py:module}} {full}\n```", *(self.definition(m, p) for p in m.public), ""])

    def front(self, offered: dict[str, str], modules: list[str]) -> str:
        "What the package itself offers, by home, and the modules in the order of reading."
        def line(name, home):
            says = self.doc(self.modules[home].definitions[name])
            return f"| {self.link(name, f'{self.package}.{name}')} | {says} |"
        lines = [f"# API reference\n\nWhat `import {self.package}` offers:\n\n| name | what it does |\n| --- | --- |"]
        lines += [line(*item) for item in offered.items()]
        lines += ["\nAll modules, in the order of reading:\n\n| module | what it is for |\n| --- | --- |"]
        lines += [f"| [{name}](api/{name}.md) | {self.text(self.modules[name].about)} |" for name in modules]
        return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *(f"api/{name}" for name in modules), "```", ""])


def write(package: Path, folder: Path, notebooks: dict[str, str]) -> None:
    "Write a page for each module into a folder, and the list beside it; given the notebooks in the order of reading."
    reference, top = Reference(package), ast.parse((package/"__init__.py").read_text(encoding="utf-8"))
    offered = {k.arg: ast.literal_eval(k.value) for k in assigned(top, "_HOMES").keywords}
    modules = [name for name in notebooks if name in reference.modules]
    folder.mkdir(parents=True, exist_ok=True)
    folder.with_suffix(".md").write_text(reference.front(offered, modules), encoding="utf-8")
    for name in modules: (folder/f"{name}.md").write_text(reference.page(name, notebooks[name]), encoding="utf-8")
