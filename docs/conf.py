"How Sphinx makes the site from what scripts/pages.py lays out. Nothing is executed and nothing is fetched."
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO/"scripts"))    # for the names of anchors
_file = ConfigParser()
_file.read(REPO/"settings.ini")
settings = _file["DEFAULT"]

project, author, release = settings["lib_name"], settings["author"], settings["version"]
copyright = f"{author}, {settings['license']}"
extensions = ["myst_nb"]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 6
myst_heading_slug_func = "pages.anchor"
# A table's headings may begin at the third level; code for a notebook may have lines for the shell
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

html_theme = "furo"
html_title = f"{project} {release}"
html_math_renderer = "mathml"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
add_module_names = False
smartquotes = False


def mathml(latex: str, display: str) -> str:
    "MathML, which browsers draw themselves, with TeX's spaces around bars and after names of functions."
    drawn = convert(latex, display=display)
    drawn = re.sub(r"<mo[^>]*>(&#x0007C;|&#x02016;)</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', drawn)
    return re.sub(r"(<mi>(?:log|exp|sin|cos|max|min)</mi>)(?!<mo)", r'\1<mspace width="0.17em"/>', drawn)


def inline(writer, node) -> None:
    "A formula in a line; the sign of punctuation after it stays with it."
    writer.body.append(mathml(node.astext(), "inline") + "\N{WORD JOINER}")
    raise SkipNode


def block(writer, node) -> None:
    "A formula on a line of its own; its \\tag goes to the margin."
    latex, *tag = re.split(r"\\tag\{(.*?)\}", node.astext())
    number = f"<span>({tag[0]})</span>" if tag else ""
    writer.body.append(f'<div class="math"><div>{mathml(latex, "block")}</div>{number}</div>')
    raise SkipNode


def setup(app) -> None:
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
