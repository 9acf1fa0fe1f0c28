"""Shared test setup: two threads at most, and every result must be fully written.

With deterministic algorithms on, `torch.empty` is filled with NaN, so a kernel that leaves an
element unwritten fails its comparison instead of passing by luck.
"""

import gc
import json
import os

import pytest
import torch

from tests import pictures
from tests.forked import free_port, run_together

torch.set_num_threads(min(2, torch.get_num_threads()))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LONGEST = ("test_launched.py", "test_two_processes.py", "test_distributed.py", "test_faults.py", "test_trl_sdpo.py")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_configure(config):
    # Without the native kernels the suite tests the reference; the warning has tests of its own.
    config.addinivalue_line("filterwarnings", "ignore:losses are computed by the reference")
    if INTERPRETED:
        from fastsdpo.testing import round_interpreted_bfloat16

        round_interpreted_bfloat16()
        # numpy's remarks on inf - inf and 0 * inf in lanes that the kernels discard
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.*")
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy.*")


def pytest_collection_modifyitems(items):
    # Files of few tests that take long: a worker that began one of them last would end minutes after the other.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    # The interpreter is chosen when Triton's kernels are imported, so these cases have a process of their own.
    for item in items:
        if item.get_closest_marker("interpreted") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1"))


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """The garbage collector passes over what imports have left: millions of objects, many times in a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _pictures(request):
    """Drawn in the files of tests that look at them."""
    with pytest.MonkeyPatch.context() as patch:
        if pictures.INSTALLED and not getattr(request.module, "DRAWS", False):
            patch.setattr("matplotlib.figure.Figure.savefig", pictures.save_undrawn)
        yield


@pytest.fixture(autouse=True)
def _deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """make(chat_template, special=[...], ordinary=[...], **names): one token per byte."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def make(chat_template, special=(), ordinary=(), **names):
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: id for id, token in enumerate(alphabet)}, []))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
        backend.add_tokens([tokenizers.AddedToken(t, special=False) for t in ordinary])
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, **names)

    return make


@pytest.fixture(scope="session")
def tiny(byte_tokenizer, tmp_path_factory):
    """A folder with a model of a few thousand weights, in the place of the models that pages name."""
    transformers = pytest.importorskip("transformers")
    tokenizer = byte_tokenizer(CHATML, special=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=258, max_position_embeddings=4096, bos_token_id=None, **shape)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("documents") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_in_one_and_two():
    """run(script, folder, runs): the script by itself and as two processes that train together, all at once.

    ``runs``: of the number of processes, what the script gets as JSON after the folder.
    """

    def run(script, folder, runs):
        port, commands = free_port(), []
        for rank, world in ((0, 1), (0, 2), (1, 2)):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment = {**names, "MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
            commands.append(([script, folder, json.dumps(runs(world))], environment))
        run_together(commands)

    return run


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """The backend "flash" runs on the CPU and in any dtype, its kernels by their contract (tests/varlen.py)."""
    from fastsdpo.prefix.attention import flash, interface
    from tests.varlen import VarlenOnCPU

    kernels = VarlenOnCPU()
    monkeypatch.setattr(flash, "VARLEN", kernels)
    monkeypatch.setattr(interface, "flash_runs_on", lambda device, dtype: True)
    return kernels
