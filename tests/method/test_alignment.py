"""Column t speaks of token t: the shift, its inverse, and the mask of what is predicted."""

import torch

from tokenweight.method import aligned_with_states, aligned_with_tokens, document_positions, prediction_mask


def test_the_shift_is_by_one_and_its_inverse_takes_it_back():
    of_states = torch.arange(1, 13).view(2, 6)
    of_tokens = aligned_with_tokens(of_states)
    assert of_tokens.tolist() == [[0, 1, 2, 3, 4, 5], [0, 7, 8, 9, 10, 11]]
    assert aligned_with_states(of_tokens, fill=-1).tolist() == [[1, 2, 3, 4, 5, -1], [7, 8, 9, 10, 11, -1]]


def test_nothing_predicts_the_first_token_of_a_sequence_or_document_or_one_without_a_label():
    labels = torch.tensor([[5, 6, -100, 8, 9, 3]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert prediction_mask(labels).tolist() == [[False, True, False, True, True, True]]
    assert prediction_mask(labels, positions).tolist() == [[False, True, False, False, True, True]]


def test_the_context_of_a_token_is_counted_in_its_document_whatever_positions_are_skipped():
    positions = torch.tensor([[0, 1, 7, 0, 1, 5], [0, 1, 2, 3, 4, 5]])
    assert document_positions(positions, positions).tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert document_positions(positions).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
