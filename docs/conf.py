"""The reference documentation, of the docstrings and the pages in Markdown: `make docs` builds it in build/docs.

The source folder is the checkout's root, so that a link means the same on a forge and in what is built.
"""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "dal_kernels"
author = "the dal_kernels authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/**", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]
exclude_patterns = ["**.py", "**.json"]

# Links to headings, as a forge makes them.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# Types are in the docstrings, with shapes; of overloads the last signature says it all.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "exclude-members": "bind, extra_repr, hearer"}
autodoc_mock_imports = ["accelerate", "fastai", "lightning", "transformers"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Returns, Raises", "returns_style")]

# A name of this package that a docstring refers to must be in the reference; those of others are not looked up.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!dal_kernels).*")]

html_theme = "furo"
html_title = "dal_kernels"
html_show_copyright = False
html_copy_source = False
html_static_path = ["static"]
html_extra_path = ["root"]  # what leads from the root to the first page
html_css_files = ["wide_tables.css"]


def name_each(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """An attribute a line, where a docstring has "a, b: text": napoleon does so with arguments alone."""
    if "Attributes:" in lines:
        start = lines.index("Attributes:")
        for at in reversed(range(start, len(lines))):
            if several := re.fullmatch(r"( {4})([a-z_]+(?:, [a-z_]+)+): (.*)", lines[at]):
                end = at + 1
                while end < len(lines) and lines[end].startswith(" " * 8):
                    end += 1
                rest = lines[at + 1 : end]
                each = several[2].split(", ")
                lines[at:end] = [line for one in each for line in (f"    {one}: {several[3]}", *rest)]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", name_each, priority=100)  # before napoleon
