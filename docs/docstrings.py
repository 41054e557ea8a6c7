"""What griffe, which reads the docstrings for the API page, would leave out or garble."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
FIELD_COMMENT = re.compile(r"#: (.+)")


class Docstrings(griffe.Extension):
    """Show doctests as code, and a field's ``#:`` comment as what it documents."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:  # without an "Examples:" heading, >>> is a Markdown quotation
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
        elif obj.is_attribute and (found := FIELD_COMMENT.search(obj.source)):
            obj.docstring = griffe.Docstring(found[1], parent=obj)
