"""Scorers other than a language model with the tokenizer of the rows: they supply both sides of the contrast."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
