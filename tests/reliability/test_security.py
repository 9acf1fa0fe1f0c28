"""Nothing that comes as data is run; nothing is sent but where told; no key is written down.

That markup in messages stays text is shown in a real browser, by tests/signal/test_page.py.
"""

import ast
import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch

from fastsdpo.cli import main
from fastsdpo.data import InteractionTokenizer
from fastsdpo.modeling import load_model_and_tokenizer
from fastsdpo.online.endpoint import ChatEndpoint

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "fastsdpo").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]
KEY = "sk-this-is-the-secret-0123456789"


class Bomb:
    """Unpickled, it makes a folder."""

    planted = 0

    def __init__(self, path):
        self.path = str(path)
        Bomb.planted += 1

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module", autouse=True)
def _counted(request, results):
    failed = request.session.testsfailed
    yield
    tests = sum(item.path == request.path for item in request.session.items)
    lost = request.session.testsfailed - failed
    what = "security: files that would run code, connections, keys (tests)"
    results.add(what, tried=tests, faults=Bomb.planted, lost=lost)


FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "yaml.load", "os.system", "marshal.loads"}
FORBIDDEN |= {"dill.load", "cloudpickle.load", "numpy.load", "np.load"}
# What processes of one run send each other, through pipes of their own, and never a file.
PIPES = {
    "fastsdpo/data/tokenizing.py": {"source", "self.process.stdout"},
    "fastsdpo/data/worker.py": {"requests"},
    "fastsdpo/data/workers.py": {"process.stdout"},
    "fastsdpo/prefix/bundle.py": set(),  # packs, which torch sends from the data loader's workers
}
AS_THE_USER_SAID = ("trust_remote_code", "options.trust_remote_code", "args.trust_remote_code")


def test_the_source_unpickles_and_evaluates_nothing():
    looked_at = 0
    for path in SOURCES:
        text = path.read_text("utf-8")
        pipes = next((pipes for name, pipes in PIPES.items() if path.as_posix().endswith(name)), None)
        kept = "pickle|dill|marshal|shelve" if pipes is None else "dill|marshal|shelve"
        assert not re.search(rf"^\s*(import|from) ({kept})\b", text, re.MULTILINE), path
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            looked_at += 1
            name, where = ast.unparse(node.func), f"{path}:{node.lineno}"
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if not (name == "pickle.load" and pipes and ast.unparse(node.args[0]) in pipes):
                assert name not in FORBIDDEN, where
            assert name != "torch.load" or options.get("weights_only") == "True", where
            assert not name.startswith("subprocess.") or options.get("shell", "False") == "False", where
            assert options.get("trust_remote_code", "False") in ("False", *AS_THE_USER_SAID), where
    assert looked_at > 1000


@pytest.fixture
def saved(lab, tmp_path):
    lab.make_model().save_pretrained(tmp_path / "model")
    lab.make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_pickled_weights_run_nothing(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "boom")}, saved / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError, RuntimeError)):
        load_model_and_tokenizer(saved)
    assert not (tmp_path / "boom").exists()


def test_code_that_comes_with_a_model_is_run_only_when_asked(saved, commands, tmp_path, capsys):
    """`auto_map` names a module of the folder, which makes a folder when it is imported."""
    code = f"import os\nos.mkdir({str(tmp_path / 'boom')!r})\nfrom transformers import LlamaConfig\n"
    (saved / "strange.py").write_text(code + "class Config(LlamaConfig):\n    model_type = 'strange'\n")
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, OSError), match="trust_remote_code"):
        load_model_and_tokenizer(saved)
    argv = ["train", str(commands["train"][1]), "--model", str(saved), "-o", str(tmp_path / "out"), "--cpu"]
    assert main(argv) == 1
    assert "`--trust-remote-code`" in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()
    assert main([*argv, "--trust-remote-code"]) == 1  # there is no model of that configuration
    assert (tmp_path / "boom").exists()


@pytest.fixture(scope="module")
def begun(runner, commands, tmp_path_factory):
    """A run of two steps, and its arguments."""
    folder = tmp_path_factory.mktemp("begun")
    argv = [*commands["train"], "--max-steps", "2"]
    assert runner(folder, argv).status == 0
    shutil.rmtree(folder / "out" / "checkpoint-2")
    (folder / "out" / "report.json").unlink()
    return folder, argv


PICKLES = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
LONG = os.environ.get("FASTSDPO_LONG") == "1"
PLANTED = [(file, False) for file in PICKLES] + [(file, True) for file in (PICKLES if LONG else PICKLES[:1])]


@pytest.mark.parametrize(("file", "summed"), PLANTED)
def test_a_checkpoint_from_elsewhere_runs_nothing(file, summed, runner, begun, tmp_path):
    """A pickle in place of a checkpoint's file; without checksums, as someone else would send it."""
    folder, argv = begun
    shutil.copytree(folder / "out", tmp_path / "out")
    place = tmp_path / "out" / "checkpoint-1"
    with open(place / file, "wb") as out:
        pickle.dump(Bomb(tmp_path / "boom"), out)
    if not summed:
        for name in ("checksums.json", "data.json"):
            (place / name).unlink()
    ended = runner(tmp_path, argv)
    assert not (tmp_path / "boom").exists()
    assert ended.status != 0
    assert file in ended.log if summed else "Weights only load failed" in ended.log


def test_a_pickle_is_no_data_file(tmp_path, saved, capsys):
    for name in ("data.jsonl", "data.parquet", "data.pkl"):
        with open(tmp_path / name, "wb") as file:
            pickle.dump(Bomb(tmp_path / "boom"), file)
        status = main(["train", str(tmp_path / name), "--model", str(saved), "-o", str(tmp_path / "out"), "--cpu"])
        assert status == 1
        assert name in capsys.readouterr().err
    assert not (tmp_path / "boom").exists()


def test_templates_of_a_tokenizer_reach_no_python(saved, tmp_path, lab):
    """A chat template that tries to get out of its sandbox is an error, not a call."""
    tokenizer = lab.make_tokenizer()
    tokenizer.chat_template = (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        "{{ cycler.__init__.__globals__.os.mkdir('" + str(tmp_path / "boom") + "') }}"
    )
    with pytest.raises(ValueError, match=r"the chat template of .* fails"):
        InteractionTokenizer(tokenizer, "note")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["prepare", "train", "online"])
def test_commands_on_local_files_connect_to_nothing(name, runner, commands, tmp_path):
    ended = runner(tmp_path, commands[name], no_network=True)
    assert "connects to" not in ended.log
    assert ended.status == 0, ended.log


def test_an_endpoint_is_asked_only_where_configured(runner, commands, tmp_path):
    """The audit hook that forbids connections does see one: that of --user-url."""
    argv = list(commands["online"])
    for option in ("--rule", "--wish"):
        at = argv.index(option)
        del argv[at : at + 2]
    argv += ["--persona", "w1", "--user-url", "http://127.0.0.1:9/v1", "--user-model", "m"]
    ended = runner(tmp_path, argv, no_network=True)
    assert ended.status == 99, ended.log
    assert set(re.findall(r"connects to \('([^']+)', (\d+)", ended.log)) == {("127.0.0.1", "9")}


def test_keys_come_from_the_environment_and_are_not_written(monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # The port of "discard": refused at once.
    endpoint = ChatEndpoint("http://127.0.0.1:9/v1", "m", max_retries=0, timeout=2)
    assert endpoint.client.api_key == KEY
    with caplog.at_level(logging.DEBUG):
        assert endpoint.reply([{"role": "user", "content": "hello"}]) is None
    assert endpoint.failures
    assert caplog.records
    assert KEY not in caplog.text
    assert KEY not in repr(vars(endpoint) | {"client": None})


@pytest.mark.parametrize("name", ["prepare", "train", "online", "chat", "eval"])
def test_no_option_takes_a_key(name, capsys):
    """A key given as an option would be in the shell's history, the process list and the report."""
    with pytest.raises(SystemExit):
        main([name, "--help"])
    options = re.findall(r"--[a-z][\w-]*", capsys.readouterr().out)
    assert options
    assert not [option for option in options if re.search("key|token$|secret|password", option)]


def test_no_setting_takes_a_key(commands, tmp_path, capsys):
    argv = [*map(str, commands["train"]), "-o", str(tmp_path / "out"), "--set", f"hub_token={KEY}"]
    assert main(argv) != 0
    said = capsys.readouterr()
    assert "tokens are read from the environment only" in said.err
    assert KEY not in said.out + said.err


def test_a_run_leaves_no_key_in_its_files(commands, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.chdir(tmp_path)
    assert main([*map(str, commands["train"]), "--max-steps", "1"]) == 0
    said = capsys.readouterr()
    assert KEY not in said.out + said.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
