"""Retrieval heads: the attention heads that copy a fact from the text, and recall without them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
