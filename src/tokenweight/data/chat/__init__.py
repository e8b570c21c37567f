"""Instructions: records of chats -> conversations -> tokens of which the answers alone are predicted -> sequences."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
