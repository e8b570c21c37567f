"""A scored sequence as shown by `show`: the choice of its passage, and the parts of the view."""

from dataclasses import dataclass

from jaxtyping import Float
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from tokenweight.data import ScoredRow, token_pieces
from tokenweight.method import Weighting
from tokenweight.view.terminal import legend, passage, summary, top_tokens


@dataclass(frozen=True)
class Shown:
    """A passage of a scored sequence, under a weighting."""

    row: ScoredRow
    weighting: Weighting
    weights: Float[Tensor, " seq"]
    """Weights of all tokens of the sequence."""
    pieces: list[str]
    """Texts of the tokens (`token_pieces`)."""
    span: slice
    """The tokens of the passage."""
    title: str
    """Name of sequence and passage, and reason for the choice."""

    @property
    def summary(self) -> Text:
        """Summary of the weights of the sequence, in one line."""
        return summary(self.weighting, self.weights, self.row.mask[0])


def choose_passage(
    row: ScoredRow, weighting: Weighting, *, start: int | None = None, num: int = 300, name: str = ""
) -> Shown:
    """Choose a passage of a scored sequence.

    Args:
        row: scored sequence.
        weighting: weighting that tints it.
        start: number of the first token of the passage; by default the passage has the largest sum of weights.
        num: number of tokens in the passage.
        name: name of the text or folder, for the title.

    Raises:
        ValueError: if `start` is not a token of the sequence, or `num` is less than 1.
    """
    weights, length = row.weigh(weighting)[0], row.tokens.shape[1]
    if num < 1:
        raise ValueError(f"num {num}: expected at least 1 token")
    chosen = start is None and num < length
    if start is None:
        start = int(weights.unfold(0, min(num, length), 1).sum(dim=1).argmax())
    if not 0 <= start < length:
        raise ValueError(f"start {start}: the sequence has tokens 0 to {length - 1}")
    stop = min(start + num, length)
    parts = [name] if name else []
    parts += [] if row.number is None else [f"row {row.number:,} of {row.num_rows:,}"]
    parts.append(f"tokens {start:,} to {stop - 1:,} of {length:,}")
    parts += ["the passage with most weight"] * chosen
    pieces = token_pieces(row.tokens[0].tolist(), row.tokenizer)
    return Shown(row, weighting, weights, pieces, slice(start, stop), " · ".join(parts))


def view(
    row: ScoredRow,
    weighting: Weighting,
    *,
    start: int | None = None,
    num: int = 300,
    top: int = 12,
    tinted: bool = True,
    name: str = "",
) -> list[RenderableType]:
    """Show a scored sequence: a title, a passage of `num` tokens, the key of its tints, a summary, the `top` tokens.

    Args:
        row: scored sequence.
        weighting: weighting that tints it.
        start: number of the first token of the passage; by default the passage has the largest sum of weights.
        num: number of tokens in the passage.
        top: number of tokens in the list.
        tinted: False without color: weights are then shown by marks.
        name: name of the text or folder, for the title.

    Raises:
        ValueError: if `start` is not a token of the sequence, or `num` is less than 1.
    """
    return parts(choose_passage(row, weighting, start=start, num=num, name=name), top=top, tinted=tinted)


def parts(shown: Shown, *, top: int = 12, tinted: bool = True) -> list[RenderableType]:
    """The parts of `view` of a chosen passage."""
    row, span = shown.row, shown.span
    losses = row.long_nll[0], row.short_nll[0]
    table = top_tokens(shown.pieces, shown.weights, *losses, row.mask[0], num=top, tinted=tinted)
    text = passage(shown.pieces[span], shown.weights[span], tinted=tinted)
    return [Text(shown.title, "bold"), text, legend(tinted=tinted), shown.summary, table]
