"""Passes divided among 2 and 4 processes, each this file, against one process: losses and gradients in float64."""

import sys

import pytest
import torch
import torch.distributed as dist

from fastsdpo.prefix import ForwardSession, Ulysses, head_parameters, not_divisible, shared_forward
from tests.forked import run_together
from tests.prefix import conftest as lab

# Grouped queries, sliding windows, capped scores, positions that the model learns, experts.
MODELS = ("llama", "gemma3", "gemma2", "mistral", "gpt2", "qwen3_moe")


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("world", "names"), [(2, ("llama",)), *(pytest.param(n, MODELS, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_processes(tmp_path, world, names):
    """Those of one model are in `make test`: nothing else there divides a pack."""
    common = [world, tmp_path / "store", *names]
    run_together([([__file__, rank, *common], {}) for rank in range(world)], timeout=400)


def packs():
    """Nested and branched histories; a teacher who reads what the student reads; fewer tokens than processes."""
    nested = lab.conversation(3, think=True)
    (same,) = lab.conversation(1, seed=3)
    same.teacher_prompt_ids = same.prompt_ids
    return [nested + lab.conversation(2, seed=1), [same, *nested[:1]], [lab.tokenized([11], [12, 13], [14, 15])]]


def passes(model, items, ulysses, **options):
    """(the loss, which is this process's part of it; rows of student and teacher, whole)."""
    count = sum(len(item.completion_ids) for item in items)
    weights = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    if ulysses is not None:
        weights = ulysses.share(weights) * ulysses.is_row(count)

    def body(session):
        student, teacher, labels = session.student(), session.teacher(), session.labels
        head = head_parameters(model)
        logps = lab.hidden_logps(student, labels.target_ids, head)
        fixed = lab.hidden_logps(teacher, labels.target_ids, head).detach()
        return (weights * (logps - fixed).square()).sum(), logps, fixed

    loss, *columns = ForwardSession(model, items, ulysses=ulysses, **options).run(body)
    if ulysses is not None:
        columns = [ulysses.whole(column, count) for column in columns]
    return loss, columns


def compare(model, items, ulysses, tolerance, **options):
    want_loss, want = passes(model, items, None, **options)
    want_loss.backward()
    want_gradients = lab.gradients(model)
    loss, got = passes(model, items, ulysses, **options)
    loss.backward()
    gradients = lab.gradients(model)
    assert (ulysses.sum(loss) - want_loss).abs() < tolerance
    for left, right in zip(want, got):
        assert (left - right).abs().max() < tolerance
    assert gradients.keys() == want_gradients.keys()
    for name, gradient in gradients.items():
        error, scale = ulysses.sum(gradient) - want_gradients[name], want_gradients[name].abs().max().clamp(min=1)
        assert error.abs().max() < tolerance * scale, name


def main(rank: int, world: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ulysses = Ulysses()
    for name in names:
        model = lab.tiny_model(name)
        if name == "llama":
            more = {"teacher_model": lab.moved_copy(model), "sharing": "interaction"}
            compare(model, packs()[0], ulysses, 1e-11, **more)
        for items in packs():
            compare(model, items, ulysses, 1e-11, attention="segments")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        compare(model, packs()[0], ulysses, 1e-11, attention="dense")
    check_refusals(ulysses)
    dist.barrier()  # no process ends its threads while another still talks to them
    dist.destroy_process_group()


def check_refusals(ulysses) -> None:
    (item,) = lab.conversation(1)
    with pytest.raises(NotImplementedError, match="sharing must not be 'off' with ulysses"):
        shared_forward(lab.tiny_model("llama"), [item], sharing="off", ulysses=ulysses)
    odd = lab.tiny_model("llama", num_attention_heads=5, num_key_value_heads=5, head_dim=8)
    with pytest.raises(NotImplementedError, match="the 5 heads of layer 0 cannot be divided by"):
        shared_forward(odd, [item], ulysses=ulysses)


def test_refused_by_name():
    from benchmarks import tiny

    assert not_divisible(lab.tiny_model("llama"), 4) is None
    assert not_divisible(lab.tiny_model("llama"), 3) == (
        "the 4 attention heads of LlamaForCausalLM cannot be divided by 3"
    )
    assert "has recurrent layers" in not_divisible(tiny.build("qwen3_5_text"), 2)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert "dynamic rotary" in not_divisible(lab.tiny_model("llama", rope_parameters=rope), 2)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
