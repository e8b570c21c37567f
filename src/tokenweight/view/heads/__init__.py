"""Retrieval heads as a map of layers and heads: for the terminal, in figures and on the page of a report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
