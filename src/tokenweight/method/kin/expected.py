"""Proper weights: the expectation of a score under the model's own prediction, instead of the score of the target."""

import dataclasses
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokenweight.method.device.products import BUFFER_BYTES, CAST_BYTES
from tokenweight.method.device.rows import active_rows
from tokenweight.method.kin.gain import BoundedGain, Gain, KeyTokens, LongFilter
from tokenweight.method.kin.longce import LongCE
from tokenweight.method.kin.pmi import NPMI, PPMI
from tokenweight.method.loss import Logits
from tokenweight.method.weightings import Dense, ScoreWeighting, Sparse, Weighting, require

DIVERGENCES: dict[str, ScoreWeighting] = {"kl": Gain(), "tv": BoundedGain(), "absolute": Dense()}
"""The named divergences, each as the weighting whose expected score it is."""
_SCORE_SETTINGS: dict[type[ScoreWeighting], tuple[str, ...]] = {
    LongFilter: (),
    PPMI: ("shift",),
    NPMI: ("shift",),
    LongCE: ("cap",),
    KeyTokens: ("alpha", "beta"),
}


@dataclasses.dataclass(frozen=True)
class Expected(Weighting):
    """A weighting by the expectation of its score: independent of the target, it leaves the optimum unchanged.

        divergence = sum over v of p_long(v) * score(-log p_long(v), -log p_short(v)),   v in the vocabulary

    replaces the score of the target, under the distributions that predict it. With weights that depend on the target
    the optimum is proportional to p · w; with these it is p. The mean over targets is that of the weighting if the long
    distribution is the true one. For `Gain` the divergence is KL(p_long || p_short), for `BoundedGain` the total
    variation, for `Dense` the expected |log ratio|.

    Args:
        weighting: one whose weights follow from a score.

    Source: ours.
    """

    formula = "that of its weighting, with the expectation of s over the long distribution as s"
    weighting: ScoreWeighting
    uses: ClassVar[frozenset[str]] = frozenset({"divergence"})
    of_losses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        holds = isinstance(self.weighting, ScoreWeighting)
        require(self, "weighting", holds, "one whose weights follow from a score of the two losses")
        of = self.weighting
        vars(self).update(pointwise=of.pointwise, selects=of.selects)
        vars(self).update(divergence_of=of, divergence=divergence_kind(of))

    def weigh(self, long: Tensor, short: Tensor, mask: Tensor, *, divergence: Tensor) -> Tensor:
        """The weights of the weighting, with the divergence as the score."""
        return self.weighting.weights(divergence, mask)

    @torch.no_grad()
    def of_logits(self, long_logits: Float[Tensor, "n V"], short_logits: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
        """The divergence of each row, in float32 or better, a part of the vocabulary at a time."""
        return _expectation(self.weighting, _Distribution(long_logits), _Distribution(short_logits))


def divergence_kind(weighting: ScoreWeighting) -> str:
    """Identifier of the expectation of a weighting's score: a name of `DIVERGENCES`, else the weighting; for ours, with
    the settings that its score depends on."""
    kind = Dense if type(weighting) is Sparse else type(weighting)  # they have the same score
    name = next((name for name, one in DIVERGENCES.items() if type(one) is kind), None)
    if name is not None or kind not in _SCORE_SETTINGS:
        return name or str(weighting)
    settings = [f"{setting}={getattr(weighting, setting)}" for setting in _SCORE_SETTINGS[kind]]
    return f"{kind.__name__.lower()}:{','.join(settings)}".removesuffix(":")


def vanishes(weighting: ScoreWeighting) -> bool:
    """Whether the score is 0 where both losses are equal, as they are in the first window of a document."""
    losses = torch.tensor([0.0, 1e-3, 0.1, 1.0, 10.0], dtype=torch.float64)
    return not weighting.score(losses, losses).any()


def linear_divergence(
    long_hidden: Float[Tensor, "N D"],
    short_hidden: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    weighting: ScoreWeighting,
    *,
    bias: Float[Tensor, " V"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    active: Int[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Both losses of each target and the divergence of its two distributions, without gradient: two head products.

    Args:
        long_hidden: states with the long context; the state in row i predicts `targets[i]`.
        short_hidden: states with the short context, of the same tokens.
        weighting: the one whose expected score is the divergence.
        chunk_size: rows whose logits are held at a time; by default as many as fit a buffer, both together.

    The other arguments, dtypes and errors are those of `linear_nll`.

    Returns:
        Long losses, short losses, divergences; 0 in rows without a target.
    """
    if long_hidden.shape != short_hidden.shape:
        shapes = f"{list(long_hidden.shape)} and {list(short_hidden.shape)}"
        raise ValueError(f"long_hidden and short_hidden have shapes {shapes}: expected one shape, [N, D]")
    of = [Logits(hidden, head, bias, scale, softcap) for hidden in (long_hidden, short_hidden)]
    if chunk_size is None:
        chunk_size = max(16, BUFFER_BYTES // (2 * of[0].dtype.itemsize * len(head)))
    with torch.no_grad(), torch.autocast(long_hidden.device.type, enabled=False):
        found = torch.zeros(3, len(targets), dtype=of[0].dtype, device=targets.device)
        active = active_rows(targets, len(head)) if active is None else active
        for rows, _ in zip(*(logits.chunks(active, chunk_size) for logits in of)):
            states = (long_hidden[rows], short_hidden[rows])
            long, short = (_Distribution(logits.fill(chunk)) for logits, chunk in zip(of, states))
            found[0, rows], found[1, rows] = long.losses(targets[rows]), short.losses(targets[rows])
            found[2, rows] = _expectation(weighting, long, short)
    return found[0], found[1], found[2]


class _Distribution:
    """Logits of rows, read only, with their normalizers; nothing else of their size is allocated."""

    def __init__(self, logits: Float[Tensor, "n V"]):
        self.logits, self.dtype = logits, torch.promote_types(logits.dtype, torch.float32)
        width = max(1, CAST_BYTES // (4 * self.dtype.itemsize * max(1, len(logits))))
        self.blocks = [slice(i, i + width) for i in range(0, logits.shape[1], width)]
        self.largest = logits.amax(dim=1, keepdim=True).to(self.dtype)
        total = torch.zeros_like(self.largest)
        for block in self.blocks:
            total += (logits[:, block].to(self.dtype) - self.largest).exp_().sum(dim=1, keepdim=True)
        self.log_total = total.log_()

    def nll(self, logits: Float[Tensor, "n some"]) -> Float[Tensor, "n some"]:
        """-log p, given logits of the rows; large ones cancel before anything is rounded."""
        return (self.largest - logits).add_(self.log_total)

    def losses(self, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """-log p of one target for each row."""
        return self.nll(self.logits.gather(1, targets[:, None])).squeeze(1)


def _expectation(weighting: ScoreWeighting, long: _Distribution, short: _Distribution) -> Float[Tensor, " n"]:
    """The sum over the vocabulary of p_long times the score; a token of probability 0 adds nothing."""
    total = torch.zeros(len(long.logits), dtype=long.dtype, device=long.logits.device)
    for block in long.blocks:
        of_long, of_short = long.nll(long.logits[:, block]), short.nll(short.logits[:, block])
        share = (-of_long).exp_()
        total += (share * weighting.score(of_long, of_short)).masked_fill_(share == 0, 0).sum(dim=1)
    return total
