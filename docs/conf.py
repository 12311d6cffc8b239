"""Sphinx's settings for the course site: pages and chapters as course/make_site.py lays them out, nothing executed.

Formulas become MathML, which browsers draw themselves: MathJax would come from a network. Does not know the pages.
"""

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = "mixoff"
author = "the mixoff authors"
extensions = ["myst_nb"]
exclude_patterns = []

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


def inline_formula(translator, node):
    """A formula within a line."""
    translator.body.append(convert(node.astext()))
    raise SkipNode


def formula(translator, node):
    """A formula on lines of its own."""
    translator.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    """Registers the renderer of formulas."""
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
