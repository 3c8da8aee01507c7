"""Sphinx settings. `sphinx-build -W --keep-going -b html docs docs/_build/html` builds the site; nothing is fetched."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]  # the code beside these pages is the code that they describe
os.environ.setdefault("OMP_NUM_THREADS", "2")

from _tools import docstrings, figures, formulas, pages  # noqa: E402

from rvlm import __version__  # noqa: E402

project, author, release = "rvlm", "The rvlm authors", __version__
copyright = "The rvlm authors. Apache-2.0"

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb",
              "sphinx_copybutton"]  # fmt: skip
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
suppress_warnings = ["myst.header"]  # decisions are headings of the third level

# Markdown and notebooks are read by one parser. Notebooks are stored, and so shown, without output; the tests run them.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
html_math_renderer = "mathml"
myst_heading_anchors = 4
copybutton_exclude = ".linenos, .gp, .go"

# `name` in a docstring is code, and a link where it names something of the library.
smartquotes = False
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_typehints = "signature"
autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
autosummary_generate = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90

html_theme = "furo"
html_title = f"rvlm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

pages.write_pages()
figures.write_figures(DOCS / "reference" / "figures")


def setup(app):
    app.connect("autodoc-process-docstring", docstrings.on_docstring, priority=100)
    app.connect("source-read", pages.on_source)
    app.add_html_math_renderer(*formulas.RENDERER)
