"""Short losses against the reference numbers and against one forward pass per token over exactly its window."""

import json
from pathlib import Path

import pytest
import torch
from crossing import crossed
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

import models
from tokenweight import Dense, Scorer, ShortContext, load_model, token_nll, with_weighted_loss

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "scoring.json").read_text())
BOS = 1
# Models whose weights are float64 take norms (Llama) or nothing (GPT-2) in float32, with a relative rounding of 6e-8;
# the batch that a window is in decides how it rounds.
CLOSE = {"llama": {"rtol": 1e-6, "atol": 1e-6}, "gpt2": {"rtol": 1e-11, "atol": 1e-11}}


@torch.no_grad()
def slow(model, tokens, context, *, bos=None, positions=None):
    """For each token of one document, a forward pass over its window up to it."""
    losses = [0.0]
    for t in range(1, len(tokens)):
        short = t >= context.size
        start = t - (context.size - context.stride + (t - context.size) % context.stride) if short else 0
        window = tokens[start : t + 1].clone()
        if bos is not None and tokens[0] == bos:
            window[0] = bos
        skipped = {}
        if positions is not None:  # the mask of ones keeps transformers from taking a jump for a new document
            skipped["position_ids"] = (positions[start : t + 1] - positions[start])[None]
            skipped["attention_mask"] = torch.ones_like(window)[None]
        logits = model(window[None], use_cache=False, **skipped).logits[0, -2]
        losses.append(-logits.log_softmax(dim=0)[tokens[t]].item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture(scope="module")
def golden_model():
    return load_model(GOLDEN / "tiny_llama")


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(c[k]) for k in ("length", "size", "stride", "bos")))
def test_short_and_long_losses_equal_those_of_the_reference_implementation(case, golden_model):
    tokens = torch.tensor(case["tokens"])
    scorer = Scorer(
        golden_model, ShortContext(case["size"], case["stride"]), prefix=() if case["bos"] is None else (case["bos"],)
    )
    # Two float32 computations of numbers up to 16, through two layers: some dozen roundings of 16 * 2**-24.
    for actual, name in ((scorer(tokens), "short"), (token_nll(golden_model, tokens), "long")):
        torch.testing.assert_close(actual, torch.tensor(case[name]), rtol=0, atol=4e-5)


@pytest.mark.parametrize("kind", CLOSE)
@crossed("size, stride, length", [(8, 4), (8, 7), (8, 1), (5, 3), (2, 1)], [1, 2, 7, 8, 9, 16, 21])
def test_every_token_is_scored_with_exactly_its_window(kind, size, stride, length):
    model, tokens, context = models.tiny(kind), models.some_tokens(3, length), ShortContext(size, stride)
    expected = torch.stack([slow(model, row, context) for row in tokens])
    torch.testing.assert_close(Scorer(model, context)(tokens), expected, **CLOSE[kind])


@pytest.mark.parametrize("kind", ["gemma2", "phi", "cohere", "mistral"])
def test_scaled_capped_biased_and_sliding_models_are_scored_as_they_are(kind):
    model, tokens, context = models.tiny(kind), models.some_tokens(2, 21), ShortContext(8, 5)
    expected = torch.stack([slow(model, row, context) for row in tokens])
    # Gemma computes attention in float32 and has logits of ten times those of the others.
    torch.testing.assert_close(Scorer(model, context)(tokens), expected, rtol=1e-5, atol=1e-5)


def test_what_is_read_at_once_changes_nothing():
    model, tokens, context = models.tiny("gpt2"), models.some_tokens(3, 40), ShortContext(8, 5)
    expected = Scorer(model, context, max_tokens=10**6)(tokens)
    for max_tokens in (1, 8, 17, 100):
        torch.testing.assert_close(Scorer(model, context, max_tokens=max_tokens)(tokens), expected, **CLOSE["gpt2"])


@pytest.mark.parametrize("max_tokens", [1, 8, 20, 32768])
def test_a_forward_pass_reads_at_most_max_tokens_or_one_window_and_keeps_no_cache(max_tokens):
    model = models.tiny("llama")
    model.config.use_cache = True
    read, caches = [], []
    scorer = Scorer(model, ShortContext(8, 5), max_tokens=max_tokens)

    def record(module, args, kwargs, output):
        read.append(kwargs["input_ids"].shape)
        caches.append(output.past_key_values)

    model.model.register_forward_hook(record, with_kwargs=True)
    scorer(models.some_tokens(3, 40))
    assert all(batch * width <= max(max_tokens, 8) for batch, width in read)
    assert all(width <= 8 for _, width in read)
    assert caches == [None] * len(read)
    if max_tokens == 32768:
        assert len(read) == 1


LENGTHS = [13, 1, 9, 2, 15]
RESTARTING = torch.tensor([t for length in LENGTHS for t in range(length)])


@pytest.mark.parametrize("bos", [None, BOS])
@pytest.mark.parametrize("kind", CLOSE)
def test_packed_documents_are_scored_as_if_alone(kind, bos):
    model, tokens, context = models.tiny(kind), models.some_tokens(2, sum(LENGTHS)), ShortContext(8, 5)
    model.config.use_cache = True
    tokens[0, 0] = tokens[1, 23] = tokens[1, 25] = BOS  # the first document of row 0, the last two of row 1
    expected = torch.stack(
        [torch.cat([slow(model, document, context, bos=bos) for document in row.split(LENGTHS)]) for row in tokens]
    )
    # Where the model knows absolute positions, they restart with each window.
    losses = Scorer(model, context, prefix=() if bos is None else (bos,))(tokens, position_ids=RESTARTING.expand(2, -1))
    torch.testing.assert_close(losses, expected, **CLOSE[kind])


def documents_apart(module, query, key, value, attention_mask, **kwargs):
    """Attention as a flash kernel has it: no mask; a batch of one row is parted where its positions restart at 0."""
    positions = kwargs["position_ids"] if len(query) == 1 else torch.arange(query.shape[2])[None]
    lengths = torch.diff(torch.cat([(positions[0] == 0).nonzero()[:, 0], torch.tensor([query.shape[2]])])).tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        for part in zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("bos", [None, BOS])
def test_windows_are_packed_where_attention_itself_keeps_documents_apart_and_padded_elsewhere(bos):
    AttentionInterface.register("documents_apart", documents_apart)
    AttentionMaskInterface.register("documents_apart", flash_attention_mask)
    tokens, context = models.some_tokens(1, sum(LENGTHS)), ShortContext(8, 5)
    tokens[0, 0] = tokens[0, 23] = BOS
    plain = models.tiny()
    expected = torch.cat([slow(plain, document, context, bos=bos) for document in tokens[0].split(LENGTHS)])
    skipping = RESTARTING + 9 * (RESTARTING > 4)
    documents = zip(tokens[0].split(LENGTHS), skipping.split(LENGTHS))
    expected_skipping = torch.cat([slow(plain, own, context, bos=bos, positions=places) for own, places in documents])
    window_lengths = [8, 8, 8, 4, 2, 8, 8, 5]  # two of the first document, none of the second, two, one, three
    shapes = {"sdpa": (8, 8), "documents_apart": (1, sum(window_lengths))}
    for attention, shape in shapes.items():
        model, read = models.tiny(attn_implementation=attention), []
        scorer = Scorer(model, context, prefix=() if bos is None else (bos,))
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs, read=read: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        losses = scorer(tokens, position_ids=RESTARTING[None])
        assert read == [shape]
        torch.testing.assert_close(losses[0], expected, **CLOSE["llama"])
        losses = scorer(tokens, position_ids=skipping[None])
        assert read[1:] == [shapes["sdpa"]]  # a kernel would take skipped positions for the borders of documents
        torch.testing.assert_close(losses[0], expected_skipping, **CLOSE["llama"])


def test_bos_begins_each_window_of_a_document_that_begins_with_it_and_no_other():
    model, tokens, context = models.tiny("gpt2"), models.some_tokens(3, 30), ShortContext(8, 5)
    tokens[1, 0] = tokens[2, 11] = BOS
    with_bos = Scorer(model, context, prefix=[BOS])(tokens)
    torch.testing.assert_close(with_bos[1], slow(model, tokens[1], context, bos=BOS), **CLOSE["gpt2"])
    without_bos = Scorer(model, context)(tokens)
    torch.testing.assert_close(with_bos[[0, 2]], without_bos[[0, 2]], **CLOSE["gpt2"])
    assert (with_bos[1] - without_bos[1]).abs().max() > 0.01


@pytest.mark.parametrize("kind", CLOSE)
def test_skipped_positions_stay_inside_the_window(kind):
    model, tokens, context = models.tiny(kind), models.some_tokens(2, 26), ShortContext(8, 5)
    steps = torch.ones(2, 26, dtype=torch.long)
    steps[:, 0] = 0
    steps[0, [6, 12, 13]], steps[1, [3, 19]] = 17, 30
    positions = steps.cumsum(dim=1)
    expected = torch.stack([slow(model, row, context, positions=place) for row, place in zip(tokens, positions)])
    losses = Scorer(model, context)(tokens, position_ids=positions)
    torch.testing.assert_close(losses, expected, **CLOSE[kind])
    assert (losses - Scorer(model, context)(tokens)).abs().max() > 0.01


def test_packed_documents_may_skip_positions_inside_a_document():
    model, tokens, context = models.tiny("gpt2"), models.some_tokens(1, 31), ShortContext(8, 5)
    positions = torch.cat([torch.arange(14) + 9 * (torch.arange(14) > 4), torch.arange(17)])
    expected = torch.cat(
        [slow(model, t, context, positions=p) for t, p in zip(tokens[0].split([14, 17]), positions.split([14, 17]))]
    )
    losses = Scorer(model, context)(tokens, position_ids=positions[None])
    torch.testing.assert_close(losses[0], expected, **CLOSE["gpt2"])


@pytest.mark.parametrize("lengths", [[30], [13, 1, 16]])
def test_given_long_losses_are_copied_for_the_first_tokens_of_a_document_and_the_rest_scored(lengths):
    model, tokens, context = models.tiny("gpt2"), models.some_tokens(2, 30), ShortContext(8, 5)
    positions = torch.tensor([[t for length in lengths for t in range(length)]] * 2)
    given = -torch.rand(2, 30, dtype=torch.float64)  # no loss is negative
    kept = given.clone()
    losses = Scorer(model, context)(tokens, position_ids=positions, long_nll=given)
    assert torch.equal(losses[positions < 8], given[positions < 8])
    fresh = Scorer(model, context)(tokens, position_ids=positions)
    torch.testing.assert_close(losses[positions >= 8], fresh[positions >= 8], **CLOSE["gpt2"])
    assert torch.equal(given, kept)


@pytest.mark.parametrize("kind", CLOSE)
def test_a_row_has_the_same_scores_in_any_batch(kind):
    model, tokens = models.tiny(kind), models.some_tokens(4, 29)
    scorer = Scorer(model, ShortContext(8, 3), max_tokens=50)
    together = scorer(tokens)
    for rows in ([0], [3, 0], [2, 1, 1]):
        torch.testing.assert_close(scorer(tokens[rows]), together[rows], **CLOSE[kind])


def test_rows_that_fit_the_short_context_have_their_long_losses():
    model, tokens = models.tiny("gpt2"), models.some_tokens(2, 12)
    for size in (12, 13, 100):
        losses = Scorer(model, ShortContext(size, 5))(tokens)
        torch.testing.assert_close(losses, token_nll(model, tokens), **CLOSE["gpt2"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_short_losses_have_the_accuracy_of_float32_at_least(dtype):
    model, tokens = models.tiny(dtype=dtype), models.some_tokens(2, 12)
    losses = Scorer(model, ShortContext(8, 5))(tokens)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The first window is also a plain forward pass; rounded to bfloat16 its losses would be off by up to 2**-8.
    torch.testing.assert_close(losses[:, :8], token_nll(model, tokens[:, :8]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("token", [models.VOCABULARY, -1])
def test_a_token_that_the_scorer_does_not_know_is_refused_by_token_and_place(token):
    tokens = models.some_tokens(2, 12)
    tokens[1, 9] = token
    message = f"token {token} of row 1, position 9 is not in the vocabulary .*{models.VOCABULARY} tokens"
    with pytest.raises(ValueError, match=message):
        Scorer(models.tiny(), ShortContext(8, 5))(tokens)


def test_a_score_that_is_not_finite_is_refused_by_place():
    model, tokens = models.tiny(), models.some_tokens(3, 20)
    scorer = Scorer(model, ShortContext(8, 5))
    tokens[tokens == 7] = 8
    tokens[1, 13] = 7  # attention multiplies its NaN by 0, so all of the window [10, 18), which scores 13 to 17, is NaN
    model.get_input_embeddings().weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="short loss of row 1, position 13 is nan"):
        scorer(tokens)


@pytest.mark.parametrize(("size", "stride"), [(8, 8), (8, 0), (1, 1), (8, 9)])
def test_a_context_that_leaves_tokens_without_any_is_refused_by_both_values(size, stride):
    with pytest.raises(ValueError, match=f"stride={stride} does not fit size={size}"):
        ShortContext(size, stride)


@pytest.mark.parametrize("kind", CLOSE)
def test_dropout_is_off_while_scoring_and_on_again_afterwards(kind):
    model, tokens, context = models.tiny(kind, dropout=0.5), models.some_tokens(2, 21), ShortContext(8, 5)
    expected = Scorer(model, context)(tokens)
    model.train()
    model.get_output_embeddings().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.testing.assert_close(Scorer(model, context)(tokens), expected, **CLOSE[kind])
    assert {name: module.training for name, module in model.named_modules()} == modes


class Small:
    """A memory in which a forward pass over more than `most` tokens does not fit."""

    def __init__(self, model, most, error):
        self.sizes, self.most, self.error = [], most, error
        model.base_model.register_forward_pre_hook(self.read, with_kwargs=True)

    def read(self, module, arguments, settings):
        self.sizes.append(settings["input_ids"].numel())
        if self.sizes[-1] > self.most:
            raise self.error


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("call", [lambda s, t: s(t), lambda s, t: s.long_nll(t)], ids=["short", "long"])
def test_fewer_windows_are_read_at_a_time_when_memory_does_not_suffice(call, error, caplog):
    model, tokens = models.tiny(), models.some_tokens(8, 24)
    expected = call(Scorer(model, ShortContext(8, 4)), tokens)
    scorer = Scorer(model, ShortContext(8, 4), max_tokens=192)
    memory = Small(model, 50, error)
    torch.testing.assert_close(call(scorer, tokens), expected, rtol=0, atol=1e-12)  # other batches, float64
    assert memory.sizes[:3] == [192, 96, 48]
    assert max(memory.sizes[2:]) <= 48
    assert scorer.max_tokens == 48
    assert [record.message for record in caplog.records] == [
        f"out of memory: from now on {num} tokens in one pass" for num in (96, 48)
    ]


def test_a_model_that_scores_itself_remembers_how_much_it_could_read():
    model, tokens = models.tiny(), models.some_tokens(8, 24)
    with_weighted_loss(model, Dense(), Scorer(model, ShortContext(8, 4), max_tokens=256))
    memory = Small(model, 200, ERRORS[0])  # enough for the sequences, and for half of their windows
    model(input_ids=tokens, labels=tokens)
    assert 256 in memory.sizes
    memory.sizes.clear()
    model(input_ids=tokens, labels=tokens)
    assert max(memory.sizes) <= 200


def test_the_scorer_that_a_bound_model_holds_can_be_printed():
    model = models.tiny()
    with_weighted_loss(model, Dense(), Scorer(model, size=8))
    assert "size=8, stride=6" in repr(model._token_weighting)


def test_a_window_that_does_not_fit_alone_is_refused(caplog):
    model = models.tiny()
    scorer = Scorer(model, ShortContext(8, 4))
    Small(model, 7, ERRORS[0])
    with pytest.raises(ValueError, match="8 tokens in one pass do not fit in memory: CUDA out of memory"):
        scorer(models.some_tokens(2, 24))


def test_another_error_of_the_model_is_not_taken_for_a_lack_of_memory():
    model = models.tiny()
    scorer = Scorer(model, ShortContext(8, 4))
    Small(model, 7, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        scorer(models.some_tokens(2, 24))


def test_size_and_stride_stand_for_a_short_context_and_not_beside_one():
    model = models.tiny()
    assert Scorer(model, size=16).context == ShortContext(16, 12)
    assert Scorer(model, size=16, stride=5).context == ShortContext(16, 5)
    for given in (
        {},
        {"stride": 4},
        {"context": ShortContext(16), "size": 16},
        {"context": ShortContext(16), "stride": 4},
    ):
        with pytest.raises(ValueError, match="size"):
            Scorer(model, **given)


def test_what_a_model_that_scores_itself_need_not_read_is_marked():
    model, tokens = models.tiny(), models.some_tokens(2, 30)
    long_nll = token_nll(model, tokens)
    short = Scorer(model, size=8).short_losses(tokens, self_scored=True)
    assert short.same_as_long.tolist() == [[t < 8 for t in range(30)]] * 2
    assert torch.equal(short.filled(long_nll), Scorer(model, size=8)(tokens, long_nll=long_nll))
    assert Scorer(model, size=8).short_losses(tokens).same_as_long is None


def test_a_scorer_says_what_scores_with_which_windows(tmp_path):
    model = models.tiny()
    assert repr(Scorer(model, size=8)) == "Scorer('LlamaForCausalLM', size=8, stride=6)"
    model.save_pretrained(tmp_path)
    expected = f"Scorer({str(tmp_path)!r}, size=8, stride=3)"
    assert repr(Scorer(load_model(str(tmp_path)), ShortContext(8, 3))) == expected
