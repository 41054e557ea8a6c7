"""TeX between dollar signs becomes MathML, which browsers draw by themselves, without a script.

pymdownx.arithmatex marks the formulas; this hook of mkdocs replaces them. TeX that cannot be
converted stops the build.
"""

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.+?)\\\)</span>'
    r'|<div class="arithmatex">\\\[(?P<display>.+?)\\\]</div>',
    re.DOTALL,
)
CONVERTER = LatexToMathML(fancy_error=False)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML made of each page."""

    def mathml(match: re.Match[str]) -> str:
        display = match["display"] is not None
        tex = html.unescape(match["display"] or match["inline"]).strip()
        try:
            formula = CONVERTER.convert_with_local_state(tex, displaystyle=display)
        except LatexError as error:
            raise PluginError(f"{page.file.src_uri}: in the formula {tex}\n{error}") from error
        # A wide formula scrolls by itself where the screen is narrow.
        return f'<div class="formula" tabindex="0">{formula}</div>' if display else formula

    return FORMULA.sub(mathml, content)
