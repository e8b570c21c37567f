"""Token alignment (column t is token t's): the one shift by one, its inverse, the mask, positions in documents."""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


def aligned_with_tokens(of_states: Shaped[Tensor, "batch seq *dim"]) -> Shaped[Tensor, "batch seq *dim"]:
    """Shift values from the state that predicts a token to the token itself; column 0 is 0.

    This and its inverse are the only shifts by one in the computation; everything else is aligned with the tokens.

        column of a row    0    1    2    3        state 0 reads token 0 and predicts token 1; nothing predicts token 0,
        of_states          a    b    c    d        and what state 3 predicts is not in the row
        result             0    a    b    c
    """
    return torch.cat([torch.zeros_like(of_states[:, :1]), of_states[:, :-1]], dim=1)


def aligned_with_states(of_tokens: Shaped[Tensor, "batch seq"], fill: int = 0) -> Shaped[Tensor, "batch seq"]:
    """The inverse of `aligned_with_tokens`: column t holds the value of token t + 1, the last column `fill`."""
    return torch.cat([of_tokens[:, 1:], torch.full_like(of_tokens[:, :1], fill)], dim=1)


def prediction_mask(
    labels: Int[Tensor, "batch seq"], position_ids: Int[Tensor, "batch seq"] | None = None
) -> Bool[Tensor, "batch seq"]:
    """True where a token is predicted and counts: a label other than -100 that does not begin a row or a document."""
    mask = labels != -100
    if position_ids is not None:
        mask &= position_ids != 0
    mask[:, 0] = False
    return mask


def document_positions(
    tokens: Int[Tensor, "rows seq"], position_ids: Int[Tensor, "rows seq"] | None = None
) -> Int[Tensor, "rows seq"]:
    """Number of tokens of its own document before each token: the context that the model has.

    Where `position_ids` restart at 0, a document begins; skipped positions (PoSE) hold no tokens.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return columns if position_ids is None else columns - columns.where(position_ids == 0, 0).cummax(dim=1).values
