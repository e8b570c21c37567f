"""Files that are complete or absent, and the metadata of every result: settings, versions, device, commit."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
