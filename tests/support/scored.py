"""Scores on disk against the scorer itself, through interruptions, and what is refused."""

import numpy as np
import torch

import models
from tokenweight import ShortContext
from tokenweight.data import RowScorer

CONTEXT = ShortContext(8, 5)
# Windows of other rows in the same forward pass change how float32 sums are rounded: through two layers, some dozen
# roundings of losses up to 16.
OTHER_BATCH = {"rtol": 0, "atol": 4e-5}


def tiny_scorer(kind=RowScorer, **settings):
    return kind(models.tiny(dtype=torch.float32), [CONTEXT], **settings)


class Interrupted(RowScorer):
    """Scores two batches; an interruption is what stops a third."""

    calls = 0

    def score(self, *args, **kwargs):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().score(*args, **kwargs)


def tensor_of(rows, name):
    return torch.as_tensor(np.stack(rows[name]))


def arrow_bytes(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.arrow")}
