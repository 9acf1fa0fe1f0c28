"""The chat templates of real families, as TRL ships them: prompt and answer are what the template itself renders."""

import importlib.util
import re
from pathlib import Path

import pytest

from fastsdpo.data import Interaction, InteractionTokenizer

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("trl is not installed")
# Those for training mark the answers, and render the same.
FILES = [path for path in sorted(FOLDER.glob("*.jinja")) if not path.stem.endswith("_training")]
TOKEN = re.compile(r"<\|[^|<>\s]*\|?>|<｜[^<>]*?｜>|<[a-z_]+\|>|</?(?:s|(?:start|end)_of_(?:turn|utterance)|image)>")
# What ends a turn, where several are in a template; Phi-3's end of text is another token.
ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>")
ENDS += ("<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "</s>")


def conversation(*turns, system=""):
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def cases():
    """Each template, and those that reason with thinking on as well."""
    for path in FILES:
        yield pytest.param(path, False, id=path.stem)
        if "enable_thinking" in path.read_text("utf-8"):
            yield pytest.param(path, True, id=f"{path.stem}, thinking")


@pytest.mark.skipif(not FILES, reason="needs the package trl")
@pytest.mark.parametrize(("path", "thinking"), [*cases()])
def test_what_is_trained_is_what_the_template_renders(byte_tokenizer, path, thinking):
    template = path.read_text("utf-8")
    tokens = sorted({*TOKEN.findall(template)} - {"<think>"})
    eos = next((token for token in ENDS if token in tokens), "<eos>")
    names = {"bos_token": "<bos>", "eos_token": eos, "pad_token": "<pad>"}
    blocks = [tag for tag in ("<think>", "</think>") if tag in template]
    tokenizer = byte_tokenizer(template, [*dict.fromkeys([*tokens, *names.values()])], blocks, **names)
    options = {"chat_template_kwargs": {"enable_thinking": True}} if thinking else {}
    tokenize = InteractionTokenizer(tokenizer, "note", **options)
    prompts = [conversation("Hi there"), conversation("A", "B\n\nb", "C?")]
    if "raise_exception('System role not supported')" not in template:
        prompts.append(conversation("A", "B", "C?", system="Be brief."))
    for prompt in prompts:
        for answer in ("Hello", "Hello\n\n  <b>you</b>"):
            one = tokenize(Interaction(prompt, answer, "Shorter."))
            whole = tokenize.chat.render(
                [*prompt, {"role": "assistant", "content": answer}], add_generation_prompt=False
            )
            ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
            got = one.prompt_ids + one.completion_ids
            if tokenize.chat.tail == "":  # the token that ends the turn begins the next message
                got.pop()
            assert got == ids[: len(got)], (tokenizer.decode(got), whole)
            assert tokenizer.decode(ids[len(got) :]).strip() in ("", eos)
            # And a model that answers is asked with what the template renders for that.
            asked = tokenizer.decode(tokenize.generation_prompt(prompt))
            assert asked == tokenize.chat.render(prompt)
            # The teacher reads the same conversation with the follow-up in it.
            told = [*prompt[:-1], {"role": "user", "content": prompt[-1]["content"] + "\n\nNote: Shorter."}]
            wanted = tokenize(Interaction(told, answer, "x")).prompt_ids
            assert one.teacher_prompt_ids == wanted
    if "</think>" in template:
        one = tokenize(Interaction(prompts[0], "<think>\nA greeting.\n</think>\n\nHello", "Shorter"))
        text = tokenizer.decode(one.prompt_ids + one.completion_ids)
        assert text.count("<think>") == text.count("</think>") == 1, text
        assert re.search(r"<think>\s*A greeting.\s*</think>\s*Hello", text)
