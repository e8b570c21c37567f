"""LongPPL: the perplexity of a model on the tokens that need the long context.

An evaluator finds these key tokens; the model itself can be it. Two models are compared on the same tokens only if one
evaluator serves both.

    long_nll = token_nll(evaluator, tokens)
    short_nll = Scorer(evaluator, PAPER_CONTEXT)(tokens, long_nll=long_nll)  # reads the first window only once
    mask = prediction_mask(tokens)
    key = key_tokens(long_nll, short_nll, mask)

    row_sums(nll, key)  # exp of its mean is LongPPL; `nll` are the losses of the evaluated model
    row_sums(nll, LongCE()(long_nll, short_nll, mask))  # the same, soft: weights min(p_long / p_short, 5)
    row_sums(key, mask)  # the share of key tokens

On one text, with one tokenizer, this is the value of the package `longppl`. What differs:

- Over several texts, the authors' script takes the mean of the LongPPL of each, weighted by its number of key tokens.
  `Sums.mean` weighs tokens before `exp`, as the formula does within one text.
- The package gives special tokens (BOS) to the evaluator only. Here both models read the rows as they are.
- It finds key tokens by their characters even with one tokenizer, so that all tokens that spell one character are key
  if one of them is.
- It fails on a text whose last window scores one token.
- It has no soft variant. The paper names one; that its weights are those of LongCE, 1 for tokens which no window
  scores, is our reading.

Source: Fang et al. 2025 (arXiv 2410.23771) and the package `longppl` 0.3.0.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenweight.benefit import key_tokens
from tokenweight.causal import prediction_mask
from tokenweight.model import refuse_length, token_nll
from tokenweight.scoring import Scorer, ShortContext

PAPER_CONTEXT = ShortContext(size=4096 + 1024, stride=1024)
"""The package's `trunc_len=4096, sliding_window=1024`: tokens see 4096 to 5119 tokens before them.

Windows and key tokens are the same. That the package begins to score at 4096, not at 5120, makes no difference: its
first window is the whole context of these tokens, whose losses are then the same and which are never key."""


def key_tokens_of_text(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Sequence[str],
    *,
    alpha: float = 2.0,
    beta: float = -2.0,
) -> Bool[Tensor, "seq"]:
    """The key tokens of a text, found by an evaluator with another tokenizer.

    The evaluator reads the text with its own tokens, special ones included. A token of ours is key if all its
    characters belong to key tokens of the evaluator.

    Args:
        scorer: of the evaluator.
        tokenizer: the evaluator's; it must be a fast one, which knows the characters of its tokens.
        pieces: the characters of each token of one document; joined, they are the text. A token without characters,
            such as BOS, has an empty piece and is never key.
        alpha: as for `key_tokens`.
        beta: as for `key_tokens`.

    Returns:
        On the CPU; one value for each piece.

    Raises:
        ValueError: if the tokenizer is not fast, or the evaluator has fewer positions than the text has tokens.

    Source: `find_key_token` and `cal_overlap` of the package `longppl` 0.3.0. Where an evaluator's tokens leave out the
    space before a word, that space counts to the word here and to no token there.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: expected one that knows offsets")
    encoded = tokenizer("".join(pieces), return_tensors="pt", return_offsets_mapping=True, verbose=False)
    tokens = encoded["input_ids"].to(scorer.model.device)
    refuse_length(scorer.model.config, tokens.shape[1], "the evaluator's model: a text")
    long_nll = token_nll(scorer.model, tokens)
    short_nll = scorer(tokens, long_nll=long_nll)
    key = key_tokens(long_nll, short_nll, prediction_mask(tokens), alpha=alpha, beta=beta)
    return _same_characters(key[0].cpu(), encoded["offset_mapping"][0], pieces)


def _same_characters(
    key: Bool[Tensor, "theirs"], spans: Int[Tensor, "theirs 2"], pieces: Sequence[str]
) -> Bool[Tensor, "ours"]:
    """Which pieces of a text consist of characters of key tokens, given the span of characters of each of these."""
    stops = torch.tensor([0, *map(len, pieces)]).cumsum(dim=0)
    is_key = torch.zeros(int(stops[-1]), dtype=torch.bool)
    before = 0
    for (start, stop), chosen in zip(spans.tolist(), key.tolist()):
        if chosen:
            is_key[min(start, before) : stop] = True
        before = max(before, stop)
    num_key = torch.cat([torch.zeros(1, dtype=torch.long), is_key.cumsum(dim=0)])[stops].diff()
    return (num_key == stops.diff()) & (num_key > 0)
