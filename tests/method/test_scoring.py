"""The index arithmetic of windows in batches, beside a loop over documents."""

import pickle

import pytest
import torch

from tokenweight import ShortContext
from tokenweight.method import NonFinite, check_finite, plan_passes, read_passes, sliding_windows


def test_the_stride_is_three_quarters_of_the_size_by_default():
    assert ShortContext(1024) == ShortContext(1024, 768)
    assert ShortContext(2).stride == 1
    with pytest.raises(ValueError, match=r"stride=0 .*size=8"):
        ShortContext(8, 0)


def test_the_short_context_of_a_sequence_is_a_quarter_of_it_by_default():
    assert ShortContext.of(4096) == ShortContext(1024, 768)
    assert ShortContext.of(4096, size=512) == ShortContext(512, 384)
    assert ShortContext.of(4096, stride=1) == ShortContext(1024, 1)
    with pytest.raises(ValueError, match=r"size 64: .* 64 tokens"):
        ShortContext.of(64, size=64)


@pytest.mark.parametrize("skip_first", [False, True])
@pytest.mark.parametrize("prefix", [(), (7,), (7, 8)])
def test_every_window_reads_its_own_document_and_its_scored_tokens_are_found_in_the_batch(skip_first, prefix):
    context, starts = ShortContext(5, 3), [[0, 9, 10, 23], [0]]
    tokens = torch.randint(100, (2, 30), generator=torch.Generator().manual_seed(0))
    positions = torch.zeros(2, 30, dtype=torch.long)
    for row, begins in enumerate(starts):
        for begin in begins:
            positions[row, begin:] = torch.arange(30 - begin)
    tokens[0, 9] = 7  # a document of one token
    tokens[0, 10:12] = tokens[1, :2] = torch.tensor([7, 8])
    tokens[0, 23:25] = torch.tensor([7, 9])
    expected = []  # (row, token that is scored, what its window reads)
    for row, begins in enumerate(starts):
        for begin, end in zip(begins, [*begins[1:], 30]):
            windows = sliding_windows(end - begin, 5, 3)
            first = [] if skip_first or end - begin < 2 else [(0, 1, min(5, end - begin))]
            for start, scored, stop in [*first, *windows]:
                read = tokens[row, begin + start : begin + stop].tolist()
                if tokens[row, begin : begin + len(prefix)].tolist() == [*prefix]:
                    read[: len(prefix)] = prefix[: len(read)]
                expected += [(row, begin + t, read) for t in range(scored, stop)]
    passes = plan_passes(tokens, positions, context, skip_first=skip_first)
    reading = read_passes(passes, tokens, None, prefix)
    width = reading.tokens.shape[1]
    found = []
    for inside, target in zip(reading.inside.tolist(), reading.target.tolist()):
        number = inside // width
        found.append((target // 30, target % 30, reading.tokens[number, : passes[number].num_tokens].tolist()))
        if inside % width:
            assert reading.tokens.flatten()[inside] == tokens.flatten()[target]
    assert found == expected


def test_what_is_not_finite_keeps_its_attributes_in_another_process():
    values = torch.zeros(3, 4)
    values[2, 1] = torch.inf
    with pytest.raises(NonFinite) as caught:
        check_finite({"a": torch.zeros(3, 4), "the weight": values}, torch.ones(3, 4, dtype=torch.bool))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert vars(copy) == {"name": "the weight", "row": 2, "position": 1, "value": torch.inf}
    assert str(copy) == str(caught.value)
