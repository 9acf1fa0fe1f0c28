"""Normalization: the two means, and their sums over a split batch."""

import torch

from fastsdpo import sequence_mean_weights, token_mean_weights

MASK = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def test_token_mean():
    w = token_mean_weights(MASK)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, MASK / 4)
    torch.testing.assert_close(token_mean_weights(MASK.bool(), num_items=8), MASK / 8)
    for nothing in (None, torch.tensor(0)):
        assert not token_mean_weights(MASK[2:], num_items=nothing).any()
        assert not sequence_mean_weights(MASK[2:], num_sequences=nothing).any()


def test_sequence_mean_counts_sequences_that_have_tokens():
    w = sequence_mean_weights(MASK)
    torch.testing.assert_close(w.sum(-1), torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(w[0], torch.tensor([0, 1, 1, 1]) / 6)
    given = sequence_mean_weights(MASK, num_sequences=torch.tensor(5))
    torch.testing.assert_close(given.sum(), torch.tensor(2 / 5))
