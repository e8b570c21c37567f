"""An extension of griffe, which reads docstrings for the site: a section "Example:" is shown as code."""

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which griffe knows it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename it in the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
