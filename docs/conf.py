"""Sphinx's settings for the course site: pages and chapters as course/make_site.py lays them out, nothing executed.

Formulas become MathML, which browsers draw themselves: MathJax would come from a network. The page of the API is made
from docstrings: a comment `<!-- api: load Runtime -->` on a page becomes the documentation of these public names.
"""

import inspect
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

project = "mixoff"
author = "the mixoff authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = []
suppress_warnings = ["ref.python"]  # fields of two classes may have one name

nb_execution_mode = "off"  # what is shown is what is stored
nb_merge_streams = True
nb_ipywidgets_js = {}  # the default loads widgets from a network; ours carry their own module
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

html_theme = "furo"
html_title = "mixoff, the course"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_last_updated_fmt = None
html_theme_options = {
    "light_css_variables": {"font-stack": "system-ui, sans-serif"},
    "navigation_with_keys": True,
    "footer_icons": [],
}
pygments_style = "tango"
pygments_dark_style = "github-dark"
toc_object_entries = False

autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
autodoc_typehints = "none"  # signatures stay readable; types are in the docstrings and in `help`
napoleon_google_docstring = False
napoleon_use_rtype = False


def inline_formula(translator, node):
    """A formula within a line."""
    translator.body.append(convert(node.astext()))
    raise SkipNode


def formula(translator, node):
    """A formula on lines of its own."""
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


API = re.compile(r"<!-- api: ([\w ]+) -->")
SECTION = re.compile(r"^ *-{3,} *$")  # numpydoc underlines Parameters, Returns, Raises
DIRECTIVE = "```{{eval-rst}}\n.. {}:: mixoff.{}{}\n```"


def public_names() -> set[str]:
    """Functions and classes that `mixoff` offers; its modules left out."""
    import mixoff

    return {name for name in mixoff.__all__ if not inspect.ismodule(getattr(mixoff, name))}


def directive(name: str) -> str:
    """What autodoc is asked for one public name."""
    import mixoff

    thing = getattr(mixoff, name)
    if not inspect.isclass(thing):
        return DIRECTIVE.format("autofunction", name, "")
    if issubclass(thing, Exception):
        return DIRECTIVE.format("autoexception", name, "")
    return DIRECTIVE.format("autoclass", name, "\n   :members:")


def write_api(app, docname, source):
    """Puts the documentation of the named things in place of each comment; a public name without one is a warning."""
    named = [name for names in API.findall(source[0]) for name in names.split()]
    if not named:
        return
    source[0] = API.sub(lambda match: "\n\n".join(map(directive, match[1].split())), source[0])
    if missing := public_names() - set(named):
        logging.getLogger(__name__).warning("%s lacks %s", docname, ", ".join(sorted(missing)))


def plain_paragraph(lines: list[str]) -> list[str]:
    """A paragraph of a docstring as reStructuredText: code in double backticks, an indented one as it stands."""
    if lines[0].lstrip().startswith(">>>") or any(line[:1].isspace() for line in lines):
        return ["::", "", *("    " + line for line in lines)]
    parts = re.split(r"(`+[^`]+`+|\*\*[^*]+\*\*)", "\n".join(lines))
    parts[::2] = [re.sub(r"([*|_])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [rf"\ ``{part.strip('`')}``\ " if part[0] == "`" else rf"\ {part}\ " for part in parts[1::2]]
    return "".join(parts).split("\n")


def plain_docstring(app, what, name, thing, options, lines):
    """Docstrings are written for `help`: Markdown's backticks and free layout become what Sphinx reads."""
    if any(SECTION.match(line) for line in lines):  # numpydoc: napoleon reads it
        lines[:] = [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in lines]
        return
    paragraphs = [part.split("\n") for part in re.split(r"\n\s*\n", "\n".join(lines).strip()) if part]
    lines[:] = [line for paragraph in paragraphs for line in [*plain_paragraph(paragraph), ""]]


def setup(app):
    """Registers the renderer of formulas."""
    app.connect("source-read", write_api)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before napoleon
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
