"""The gallery's links to its pages end in a slash, as the pages' addresses do.

mkdocs-gallery writes ``href="1_name"``, which a server must redirect and a local file is not.
"""

import re
from typing import Any

LINK = re.compile(r'(<a class="reference internal" href="[^"/#?]+)"')


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML made of each page."""
    return LINK.sub(r'\1/"', content) if page.file.src_uri.startswith("tutorials/") else content
