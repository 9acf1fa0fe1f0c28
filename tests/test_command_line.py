"""The command line as a whole: options, help, suggestions and files of options, for every command."""

import argparse
import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsdpo.cli import COMMANDS, main
from fastsdpo.commands import train
from fastsdpo.commands.options import choose_device
from fastsdpo.data.filters import ConversationFilter
from fastsdpo.settings import OnlineSDPOSettings, SDPOSettings
from fastsdpo.trainer.config import SDPOConfig

ROOT = Path(__file__).parents[1]


def parser_of(command, monkeypatch):
    """The parser that a command builds."""
    found = []

    def stop(self, *arguments):
        found.append(self)
        raise SystemExit

    module = importlib.import_module(COMMANDS[command][0])
    monkeypatch.setattr("fastsdpo.commands.parser.Parser.parse_args", stop)
    with pytest.raises(SystemExit):
        module.main([])
    return found[0]


def test_every_option_has_help_and_one_meaning(monkeypatch):
    meaning: dict[str, set] = {}
    for command in COMMANDS:
        parser = parser_of(command, monkeypatch)
        for action in [action for action in parser._actions if action.help != argparse.SUPPRESS]:
            text = parser._get_formatter()._get_help_string(action).replace("%%", "%")
            where = (command, *action.option_strings, text)
            if action.option_strings and action.nargs != 0 and not action.required:
                assert text.count("Default: ") == 1, where
            for flag in action.option_strings:
                meaning.setdefault(flag, set()).add(action.dest)
        told = parser.format_help()
        assert told.startswith(f"usage: fastsdpo {command} ") and max(map(len, told.splitlines())) <= 119, command
        if command not in ("demo-data", "bench", "doctor"):
            assert "--config" in told, command
        if command in ("train", "online", "chat", "eval", "signal", "merge", "bench"):
            assert "--device" in told, command
    assert not {flag: names for flag, names in meaning.items() if len(names) > 1}


def test_options_are_the_settings_of_the_configuration():
    parser = train.build_parser()
    told = " ".join(parser.format_help().split())
    for name, setting in SDPOSettings.__dataclass_fields__.items():
        assert SDPOConfig.__dataclass_fields__[name].default == setting.default, name
        if "group" in setting.metadata:
            flag = parser.flag_of(name)
            assert flag and flag.startswith("--") and " " not in flag and flag in told, name
    assert "Default: 2e-06." in told and "Default: cosine." in told


RUN = ["train", "data.jsonl", "--model", "m", "-o", "out"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*RUN, "--lr", "1e-5"], "fastsdpo train: unknown option --lr; did you mean --learning-rate?"),
        ([*RUN, "--num_train_epochs=1"], "did you mean --epochs?"),
        ([*RUN, "--evl-steps", "1"], "did you mean --eval-steps?"),
        ([*RUN, "--is-clip", "1"], "did you mean --set is_clip=...?"),
        (["train", "data.jsonl", "--modle", "m"], "unknown option --modle; did you mean --mode or --model?"),
        ([*RUN, "--teacher", "forzen"], "--teacher must be one of live, ema, frozen, trust_region, got 'forzen'"),
        ([*RUN, "--topk", "many"], "--topk must be a whole number, got 'many'"),
        ([*RUN, "--push-to-hub"], "--push-to-hub needs a value"),
        (["prepare", "a.jsonl", "-o", ""], "--output must name a file or folder, got an empty text"),
        ([*RUN, "more.jsonl"], "unexpected argument 'more.jsonl'"),
        (["train"], "missing: DATA, --model"),
        (["chat", "--model", "m", "-o", "c", "--epochs", "1"], "unknown option --epochs"),
        (["prepare", "x", "-o", "y", "--layot", "trl"], "did you mean --layout?"),
    ],
)
def test_wrong_options_are_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and said in line, line


def test_a_file_of_options(tmp_path, capsys):
    """Options of the command line win; a positional argument may stand in the file; what was given comes back."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: a.jsonl\nmodel: m\noutput: out\nlearning_rate: 1e-5\nquiet: true\nreport-to: [wandb, trackio]\n"
        "set:\n  adam_beta2: 0.95\n  optim: adamw_torch\nallow-leaks: false\ntemplate: '--{o}'\n"
    )
    options = train.build_parser().parse_args(["--config", str(file), "-o", "other", "--set", "seed=1"])
    assert (options.data, options.model, options.output, options.learning_rate) == ("a.jsonl", "m", "other", 1e-5)
    assert options.quiet and options.report_to == ["wandb", "trackio"] and options.template == "--{o}"
    assert options.set == ["seed=1"] and not hasattr(options, "allow_leaks")
    assert options.given["learning-rate"] == 1e-5 and options.given["data"] == "a.jsonl"
    options = train.build_parser().parse_args(["b.jsonl", f"--config={file}"])
    assert options.data == ["b.jsonl"] and options.set == ["adam_beta2=0.95", "optim=adamw_torch"]
    for text, said in (
        ("lr: 1", "unknown option 'lr'; did you mean --learning-rate?"),
        ("model: [a, b]", "model must be one value"),
        ("lora: true", "lora must have a value"),
        ("quiet: 3", "quiet must be true or false"),
        ("- a", "must hold lines NAME: VALUE, got list"),
        ("a: [", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit):
            train.build_parser().parse_args(["d", "--config", str(file)])
        assert said in capsys.readouterr().err, text


@pytest.mark.parametrize(
    ("device", "visible", "after"), [("cuda:1", None, "1"), ("cuda:1", "4,7", "7"), ("cuda", "4,7", "4,7")]
)
def test_a_gpu_by_number(device, visible, after, monkeypatch):
    """It is the only one that torch will find; TrainingArguments would take the first."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    options = argparse.Namespace(device=device)
    choose_device(options)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after and options.device == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ValueError, match="--device must be one of the GPUs"):
        choose_device(argparse.Namespace(device="cuda:1"))


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "import sys, fastsdpo.cli as c; sys.exit(c.main(['demo-data', '/dev/null', '--overwrite']))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() in (0, 141)


def test_demo_data_is_whole_or_absent_and_keeps_links(tmp_path, monkeypatch, capsys):
    def fails(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastsdpo.data.output.os.fsync", fails)
        assert main(["demo-data", str(tmp_path / "new" / "a.jsonl")]) == 1
    assert "FILE: no space left on device" in capsys.readouterr().err and not list(tmp_path.glob("new/*"))
    (tmp_path / "link").symlink_to(tmp_path / "there.jsonl")
    assert main(["demo-data", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there.jsonl").is_file()


def names_read(module, seen):
    """Attributes and texts in a module of commands and in those that it imports, but for the options' definitions."""
    if module in seen:
        return set()
    seen.add(module)
    tree, found = ast.parse(Path(importlib.import_module(module).__file__).read_text("utf-8")), set()
    defined = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and "add_argument" in ast.unparse(node.func)
    ]
    for node in set(ast.walk(tree)) - {part for call in defined for part in ast.walk(call)}:
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value, node.value.replace("-", "_")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsdpo.commands"):
            names = (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
            modules = [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").is_file()]
            found = found.union(*(names_read(name, seen) for name in modules))
    return found


def test_every_option_is_read_by_its_command(monkeypatch):
    rules = ConversationFilter.__dataclass_fields__  # `prepare` takes all
    settings = {*OnlineSDPOSettings.__dataclass_fields__, *SDPOConfig.__dataclass_fields__}  # `read_config` takes all
    for command in COMMANDS:
        read = names_read(COMMANDS[command][0], set())
        for action in parser_of(command, monkeypatch)._actions:
            given = {f"{role}_{part}" for role in ("user", "judge") for part in ("url", "model", "local")}
            if action.dest not in {"help", "config", "schema", "list_rules", *settings, *given, *rules}:
                assert action.dest in read, (command, action.dest)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--set", "seed=1", "--seed", "2"], "--seed 2 is given, and --set seed too: leave one of them out"),
        (["train", "--schedule", "constant", "--warmup", "9"], "--warmup needs a schedule that warms up: --schedule"),
        (["train", "--save-steps", "9", "--set", "save_strategy=no"], "--save-steps needs --set save_strategy=steps"),
        (["train", "--allow-leaks"], "--allow-leaks needs held-out interactions (--eval-data)"),
        (["train", "--set", "measure_answers=3"], "--set measure_answers needs held-out interactions (--eval-data)"),
        (["train", "--show", "3", "--quiet"], "--show goes without --quiet"),
        (["train", "--revision", "v1"], "--revision needs a hub id as --model, got the folder or file m"),
        (["online", "--wish", "w", "--praise", "p"], "--praise needs a user of rules"),
        (["online", "--wish", "w", "--set", "teacher_check=3"], "--set teacher_check is of `fastsdpo train`"),
        (["online", "--wish", "w", "--set=generation_model=a"], "--set generation_model needs --generation-url URL"),
        (["chat", "--set", "non_finite=skip"], "--set non_finite: a chat does not read it"),
        (["eval", "--write", "arena_hard", "--base", "m", "-o", "x"], "--base does not go with --write"),
        (["prepare", "--seed", "3", "--no-shuffle"], "--seed needs --shuffle or --eval-fraction"),
        (["bench", "--without", "liger"], "--without must be of "),
    ],
)
def test_options_without_effect_are_refused(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("m").mkdir()
    Path("d.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "a"}], "completion": {"role": "assistant", "content": "b"}, '
        '"user_response": {"role": "user", "content": "c"}}\n'
    )
    run = {"train": ["d.jsonl", "--model", "m", "-o", "o"], "chat": ["--model", "m", "-o", "o"], "bench": []}
    run |= {"online": run["train"], "eval": ["d.jsonl", "--model", "m"], "prepare": ["d.jsonl", "-o", "i.jsonl"]}
    assert main([argv[0], *run[argv[0]], *argv[1:]]) == 1
    assert said in capsys.readouterr().err


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", stop)
    assert main(["train", "x.jsonl"]) == 130
    assert capsys.readouterr().err == "fastsdpo train: stopped at once\n"
