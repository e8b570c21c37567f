"""Contents and order of rows: pieces by length, rows by topic, and how much context their tokens have."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
