"""A model's own scores, laid out as vLLM does, come back as the teacher; misaligned ones are refused."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import fastsdpo
from fastsdpo.integrations.vllm import teacher_from_outputs, teacher_from_prompt_logprobs

V = 11


@dataclass
class Logprob:
    """The fields of vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def serve(log_probs, tokens, k):
    """vLLM's layout: the k most likely tokens of each position, and the token itself."""
    entries = [None]
    for row, token in zip(log_probs[:-1], tokens[1:]):
        ranked = row.argsort(descending=True).tolist()
        chosen = dict.fromkeys([token, *ranked[:k]])  # vLLM puts the token first
        entries.append({t: Logprob(row[t].item(), ranked.index(t) + 1, f"<{t}>") for t in chosen})
    return entries


def as_json(entries):
    plain = [e and {str(t): vars(p) for t, p in e.items()} for e in entries]
    return json.loads(json.dumps(plain))


@pytest.fixture
def served():
    sequences, lengths = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3]], [3, 2]
    log_probs = [torch.randn(len(s), V).log_softmax(-1) for s in sequences]
    entries = [serve(p, s, 4) for p, s in zip(log_probs, sequences)]
    return SimpleNamespace(sequences=sequences, lengths=lengths, log_probs=log_probs, entries=entries)


@pytest.mark.parametrize("layout", ["objects", "json", "numbers", "flat"])
def test_layouts(served, layout):
    entries = served.entries
    if layout == "json":
        entries = [as_json(e) for e in entries]
    if layout == "flat":  # vLLM's FlatLogprobs give an empty first entry
        entries = [[e or {} for e in s] for s in entries]
    if layout == "numbers":
        entries = [[e and {t: p.logprob for t, p in e.items()} for e in s] for s in entries]
    found = teacher_from_prompt_logprobs(entries, served.sequences, served.lengths, topk=4)
    assert found.target_ids.tolist() == [[1, 5, 9], [5, 3, -100]]
    assert found.target_ids.dtype == torch.int64
    for row, (log_probs, tokens, length) in enumerate(zip(served.log_probs, served.sequences, served.lengths)):
        predicting = log_probs[-length - 1 : -1]
        want = predicting[range(length), tokens[-length:]]
        torch.testing.assert_close(found.teacher_logps[row, :length], want)
        values, ids = predicting.topk(4)
        assert torch.equal(found.teacher_topk[0][row, :length], ids)
        torch.testing.assert_close(found.teacher_topk[1][row, :length], values)
    assert found.teacher_logps[1, 2] == 0


def test_as_the_teacher_of_a_loss(served):
    """The same losses as from the teacher's own logits, the padding without gradient."""
    found = teacher_from_prompt_logprobs(served.entries, served.sequences, served.lengths, topk=4)
    student = torch.randn(2, 3, V, requires_grad=True)
    teacher = torch.zeros(2, 3, V)
    for row, (log_probs, n) in enumerate(zip(served.log_probs, served.lengths)):
        teacher[row, :n] = log_probs[-n - 1 : -1]
    options = {"mode": "sampled_token"}
    got = fastsdpo.sdpo_loss(student, None, found.target_ids, teacher_logps=found.teacher_logps, **options)
    want = fastsdpo.sdpo_loss(student, teacher, found.target_ids, **options)
    torch.testing.assert_close(got.per_token_loss, want.per_token_loss)
    out = fastsdpo.sdpo_loss(student, None, found.target_ids, teacher_topk=found.teacher_topk, mode="topk", alpha=0.0)
    out.loss.backward()
    assert (student.grad[1, 2] == 0).all() and student.grad.isfinite().all()


def test_request_outputs(served):
    outputs = [
        SimpleNamespace(prompt_logprobs=e, prompt_token_ids=t) for e, t in zip(served.entries, served.sequences)
    ]
    found = teacher_from_outputs(outputs, served.lengths)
    want = teacher_from_prompt_logprobs(served.entries, served.sequences, served.lengths)
    assert torch.equal(found.teacher_logps, want.teacher_logps) and found.teacher_topk is None
    outputs[1].prompt_logprobs = None
    with pytest.raises(ValueError, match=r"output 1 must have prompt_logprobs.*SamplingParams"):
        teacher_from_outputs(outputs, served.lengths)


def changed(sequence, position, entry):
    return lambda entries, tokens, lengths: entries[sequence].__setitem__(position, entry)


NAN, HIGH = Logprob(float("nan")), Logprob(-0.1)
# What is done to (entries, tokens, lengths), the error and its words.
ERRORS = {
    "a token too many": (
        lambda e, t, n: e[1].append(e[1][-1]),
        "sequence 1: .*an entry for each of the 4 tokens, got 5",
    ),
    "one late": (lambda e, t, n: e[0].pop(0) or e[0].append(e[0][-1]), "sequence 0: the first entry must be None"),
    "shifted": (
        lambda e, t, n: e[0].insert(1, e[0][1]) or e[0].pop(),
        r"sequence 0, position \d: must score token \d, got scores of",
    ),
    "missing entry": (changed(0, 4, None), "sequence 0, position 4: must be a mapping of token ids, got NoneType"),
    "no logprob": (
        changed(0, 3, {1: {"rank": 1}}),
        "position 3: must map a token id to an object or .* with logprob, got 1:",
    ),
    "text keys": (changed(0, 3, {"the": {"logprob": -1.0}}), "position 3: .*'the'"),
    "not a number": (changed(0, 3, {1: NAN}), "position 3: token 1 must have a log-probability <= 0, got nan"),
    "logits": (changed(0, 3, {1: Logprob(7.5)}), "position 3: token 1 must have a log-probability <= 0, got 7.5"),
    "too much mass": (changed(0, 3, {1: HIGH, 2: HIGH}), "position 3: probabilities must sum to at most 1, got 1.810"),
    "twice": (changed(0, 3, {1: HIGH, "1": HIGH}), "position 3: must have distinct token ids >= 0, got 1 twice"),
    "too few": (
        changed(1, 2, {5: HIGH}),
        "sequence 1, position 2: must score topk = 4 .*, got 1; .*prompt_logprobs=4",
    ),
    "response": (lambda e, t, n: n.__setitem__(1, 4), r"sequence 1: completion_lengths must lie in \[1, 3\].*got 4"),
    "sequences": (lambda e, t, n: n.pop(), "must have one entry per sequence, got 2, 2 and 1"),
}
TYPES = ("missing entry", "no logprob", "text keys")


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_position(served, name):
    change, message = ERRORS[name]
    change(served.entries, served.sequences, served.lengths)
    with pytest.raises(TypeError if name in TYPES else ValueError, match=message):
        teacher_from_prompt_logprobs(served.entries, served.sequences, served.lengths, topk=4)


def test_topk_must_be_positive(served):
    with pytest.raises(ValueError, match="topk must be a positive integer or None, got 0"):
        teacher_from_prompt_logprobs(served.entries, served.sequences, served.lengths, topk=0)
