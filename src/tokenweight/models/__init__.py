"""Models of transformers: loaded, checked, extended, bound to a weighted loss."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
