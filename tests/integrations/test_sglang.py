"""Replies in SGLang's documented layout become the same teacher as vLLM's; others are refused."""

import copy
import json

import pytest
import torch

from fastsdpo.integrations.sglang import teacher_from_generate

V, K = 11, 3
SEQUENCES, LENGTHS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3]], [3, 2]


def reply_of(log_probs, tokens, start=0, text=None):
    """One reply of ``/generate`` through JSON; the K most likely tokens are listed without the token itself."""
    own, best = [[None, tokens[start], text]], [None]
    for row, token in zip(log_probs[start:], tokens[start + 1 :]):
        own.append([row[token].item(), token, text])
        best.append([[value.item(), i.item(), text] for value, i in zip(*row.topk(K))])
    meta = {"id": "1", "prompt_tokens": len(tokens), "input_token_logprobs": own, "input_top_logprobs": best}
    meta |= {"output_token_logprobs": [[-0.5, 7, text]], "output_top_logprobs": [[[-0.5, 7, text]]]}
    return json.loads(json.dumps({"text": " a", "output_ids": [7], "meta_info": meta}))


@pytest.fixture
def served():
    torch.manual_seed(0)
    return [torch.randn(len(tokens), V).log_softmax(-1) for tokens in SEQUENCES]


@pytest.mark.parametrize(("start", "text"), [(0, None), (1, " word")])
def test_scores(served, start, text):
    replies = [reply_of(p, tokens, start, text) for p, tokens in zip(served, SEQUENCES)]
    found = teacher_from_generate(replies, SEQUENCES, LENGTHS, topk=K)
    assert found.target_ids.tolist() == [[1, 5, 9], [5, 3, -100]]
    for row, (log_probs, tokens, length) in enumerate(zip(served, SEQUENCES, LENGTHS)):
        predicting = log_probs[-length - 1 : -1]
        torch.testing.assert_close(found.teacher_logps[row, :length], predicting[range(length), tokens[-length:]])
        values, ids = predicting.topk(K)
        assert torch.equal(found.teacher_topk[0][row, :length], ids)
        torch.testing.assert_close(found.teacher_topk[1][row, :length], values)
    assert teacher_from_generate(replies, SEQUENCES, LENGTHS).teacher_topk is None


def lists(meta):
    return meta["input_token_logprobs"], meta["input_top_logprobs"]


# What is done to a reply's meta_info, the error and its words.
ERRORS = {
    "not asked for": (lambda m: m.pop("input_token_logprobs"), ValueError, "must have input_token_logprobs; ask"),
    "no top": (lambda m: m.pop("input_top_logprobs"), ValueError, "ask for them with top_logprobs_num=3"),
    "one short": (lambda m: lists(m)[1].pop(), ValueError, "got 6 and 5"),
    "a token more": (lambda m: [x.insert(0, x[0]) for x in lists(m)], ValueError, "at most the 6 tokens that"),
    "other tokens": (
        lambda m: lists(m)[0][4].__setitem__(1, 8),
        ValueError,
        "reply 0, position 4: must score token 5, got 8",
    ),
    "starts late": (
        lambda m: [x.__delitem__(slice(4)) or x.__setitem__(0, y) for x, y in zip(lists(m), ([None, 5, None], None))],
        TypeError,
        "sequence 0, position 3: must be a mapping",
    ),
    "cut": (lambda m: m.update(prompt_tokens=5), ValueError, "must have read the 6 tokens .* prompt_tokens = 5"),
    "twice": (
        lambda m: lists(m)[1][4].__setitem__(1, lists(m)[1][4][0]),
        ValueError,
        r"position 4: must list distinct tokens, got \d+ twice",
    ),
    "pairs": (lambda m: lists(m)[0].__setitem__(2, [-1.0, 4]), TypeError, "position 2: must be .log-prob, token id"),
    "logits": (lambda m: lists(m)[0][3].__setitem__(0, 3.5), ValueError, "must have a log-probability <= 0, got 3.5"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_position(served, name):
    change, error, words = ERRORS[name]
    replies = [reply_of(p, tokens) for p, tokens in zip(copy.deepcopy(served), SEQUENCES)]
    change(replies[0]["meta_info"])
    with pytest.raises(error, match=words):
        teacher_from_generate(replies, SEQUENCES, LENGTHS, topk=K)
