"""Storage of rows: mapped into memory, in another order, or remote."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
