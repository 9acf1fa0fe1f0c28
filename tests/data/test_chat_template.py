"""Chat templates of many kinds: an answer is trained on where its template puts it, or refused.

The templates are TRL's, or short ones in the manner of the families they are named after.
"""

import datetime
import importlib.util
import re
from pathlib import Path

import pytest

from fastsdpo.data import Interaction, InteractionTokenizer
from fastsdpo.data.chat_template import ChatTemplate

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.submodule_search_locations[0]) / "chat_templates" if SPEC else Path("trl is not installed")
SHORT = {
    # The index of the last message of the user.
    "@LAST": "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    # c: the answer, r: its reasoning
    "@SPLIT": "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}",
    "@CHATML": "<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n",
    "@TODAY": "{{ strftime_now('%d %B %Y') }}",
    r"\n": "\0",  # a newline of the template
}
# name | eos token | what ends a turn; "+" special and "-" other added tokens; the template, in lines that are joined,
# or the file of it in TRL
TEMPLATES = r"""
# chatml | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|>
{% for m in messages %}@CHATML{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}
# chatml without a generation prompt | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|>
{% for m in messages %}@CHATML{% endfor %}
# llama 3 | <|end_of_text|> | <|eot_id|>
+ <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>
TRL: llama3_2
# qwen 3 | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|>
- <think> </think>
TRL: qwen3
# qwen 3 thinking | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|>
- <think> </think>
@LAST{% for m in messages %}{% if m.role == 'assistant' %}@SPLIT<|im_start|>assistant\n{% if loop.index0 > ns.last %}
<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% else %}@CHATML{% endif %}{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}
# gemma 3 | <eos> | <end_of_turn>
+ <bos> <eos> <start_of_turn> <end_of_turn>
- \n \n\n
TRL: gemma3
# mistral | </s> | </s>
+ <s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]
<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role =
= 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}
# gpt-oss | <|return|> | <|return|>
+ <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|>
TRL: gptoss
# glm 4.5 | <|endoftext|> | <|user|>
+ <|endoftext|> [gMASK] <sop> <|user|> <|assistant|> <|system|>
- <think> </think>
TRL: glm4moe
# deepseek r1 | <｜end▁of▁sentence｜> | <｜end▁of▁sentence｜>
+ <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
- <｜User｜> <｜Assistant｜> <think> </think>
TRL: deepseek_r1_distill
# deepseek v3.1 | <｜end▁of▁sentence｜> | <｜end▁of▁sentence｜>
+ <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
- <｜User｜> <｜Assistant｜> <think> </think>
<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}
<｜User｜>{{ m.content }}{% else %}<｜Assistant｜></think>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>
{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% if thinking is defined and thinking %}<think>
{% else %}</think>{% endif %}{% endif %}
# smollm 3 | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|>
- <think> </think>
{% set think = not (enable_thinking is defined and not enable_thinking) %}
<|im_start|>system\nToday Date: @TODAY\nReasoning Mode: {{ '/think' if think else '/no_think' }}
<|im_end|>\n{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% if not think %}
<think>\n\n</think>\n{% endif %}{{ m.content.lstrip('\n') }}<|im_end|>\n{% else %}@CHATML{% endif %}{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant\n{% if not think %}<think>\n\n</think>\n{% endif %}{% endif %}
# granite | <|end_of_text|> | <|end_of_text|>
+ <|end_of_text|> <|start_of_role|> <|end_of_role|>
{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Today's Date: @TODAY.<|end_of_text|>\n{% e
ndif %}{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}
<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}
# phi 4 | <|im_end|> | <|im_end|>
+ <|endoftext|> <|im_start|> <|im_end|> <|im_sep|>
{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}
# phi 4 mini | <|endoftext|> | <|end|>
+ <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}
# command | <|END_OF_TURN_TOKEN|> | <|END_OF_TURN_TOKEN|>
+ <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|>
+ <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|>
{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>
<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}{% endif %}
<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}
# command r7b | <|END_OF_TURN_TOKEN|> | <|END_OF_TURN_TOKEN|>
+ <BOS_TOKEN> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|>
+ <|START_RESPONSE|> <|END_RESPONSE|> <|START_THINKING|> <|END_THINKING|>
{{ bos_token }}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>You help.<|END_OF_TURN_TOKEN|>{% for m in messages %}
<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}
<|END_RESPONSE|>{% else %}<|{{ m.role | upper }}_TOKEN|>{{ m.content }}{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% if enable_thinking is defined and not enable_thinking %}
<|START_THINKING|><|END_THINKING|>{% endif %}
# seed oss | <seed:eos> | <seed:eos>
+ <seed:bos> <seed:eos>
{% for m in messages %}<seed:bos>{{ m.role }}\n{{ m.content.split('</seed:think>')[-1] | trim }}<seed:eos>{% endfor %}
{% if add_generation_prompt %}<seed:bos>assistant\n{% if enable_thinking is defined and not enable_thinking %}
<seed:think>\nThe budget is 0, so I answer directly.\n</seed:think>{% endif %}{% endif %}
# llama 3 as first released | <|end_of_text|> | <|eot_id|>
+ <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>
{% for m in messages %}{{ bos_token if loop.first else '' }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n
{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n
# phi that always asks | <|end_of_text|> | <|im_end|>
+ <|end_of_text|> <|im_start|> <|im_end|> <|im_sep|>
<|im_start|>system<|im_sep|>You help.<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}
<|im_end|>{% endfor %}<|im_start|>assistant<|im_sep|>
# gemma 4 | <eos> | <turn|>
+ <bos> <eos> <|turn> <turn|> <|channel> <channel|>
{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content.split('
<channel|>')[-1] | trim }}<turn|>\n{% endfor %}{% if add_generation_prompt %}
<|turn>model\n{% if enable_thinking is defined and not enable_thinking %}<|channel>thought\n<channel|>{% endif %}
{% endif %}
# olmo 3 | <|endoftext|> | <|endoftext|>
+ <|endoftext|> <|im_start|> <|im_end|>
{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}
{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% if not loop.last %}
<|im_end|>\n{% else %}{{ eos_token }}{% endif %}{% else %}@CHATML{% endif %}{% if loop.last and add_generation_
prompt %}
<|im_start|>assistant\n{% endif %}{% endfor %}
# olmo 3 think | <|endoftext|> | <|endoftext|>
+ <|endoftext|> <|im_start|> <|im_end|>
- <think> </think>
{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}{% if not loop.last %}
<|im_end|>\n{% else %}{{ eos_token }}{% endif %}{% else %}@CHATML{% endif %}{% if loop.last and add_generation_
prompt %}
<|im_start|>assistant\n<think>{% endif %}{% endfor %}
# minimax m2 | [e~[ | [e~[
+ ]~!b[ ]~b] [e~[
- <think> </think>
@LAST]~!b[]~b]system\nYou are a helpful assistant.[e~[\n{% for m in messages %}{% if m.role == 'assistant' %}@SPLIT]~
b]ai
\n{% if r and loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}[e~[\n{% else %}]~b]{{ m.role }
}\n
{{ m.content }}[e~[\n{% endif %}{% endfor %}{% if add_generation_prompt %}]~b]ai\n<think>\n{% endif %}
# kimi k2 | [EOS] | <|im_end|>
+ [BOS] [EOS] <|im_end|> <|im_user|> <|im_assistant|> <|im_system|> <|im_middle|>
- <think> </think>
@LAST{% for m in messages %}{% if m.role == 'assistant' %}@SPLIT<|im_assistant|>assistant<|im_middle|>
{% if loop.index0 > ns.last %}<think>{{ r }}</think>{% else %}<think></think>{% endif %}{{ c }}<|im_end|>{% else %}
<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_
prompt %}
<|im_assistant|>assistant<|im_middle|>{% endif %}
# apertus | <|assistant_end|> | <|assistant_end|>
+ <s> <|system_start|> <|system_end|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|>
+ <|developer_start|> <|developer_end|> <|inner_prefix|> <|inner_suffix|>
<s>{% if messages[0].role == 'system' %}<|system_start|>{{ messages[0].content }}<|system_end|>{% else %}<|system_
start|>
You are Apertus. Date: {{ strftime_now('%Y-%m-%d') }}<|system_end|>{% endif %}<|developer_start|>Deliberation: disabled
<|developer_end|>{% set ns = namespace(inside=false) %}{% for m in messages %}{% if m.role == 'user' %}{% if ns.
inside %}
<|assistant_end|>{% set ns.inside = false %}{% endif %}<|user_start|>{{ m.content }}<|user_end|>{% elif m.role == '
assistant
' %}{% if not ns.inside %}<|assistant_start|>{% set ns.inside = true %}{% endif %}{{ m.content }}{% endif %}{
% endfor %}
{% if ns.inside and not add_generation_prompt %}<|assistant_end|>{% endif %}{% if add_generation_prompt %}
<|assistant_start|>{% endif %}
# white space before the end | </s> | </s>
+ </s>
{% for m in messages %}[{{ m.role }}]\n{{ m.content }}\n</s>\n{% endfor %}
{% if add_generation_prompt %}[assistant]\n{% endif %}
"""
# Templates whose roles are plain text, for tokenizers that put a space (as ▁) before text.
SPACED_TEMPLATES = r"""
# zephyr
{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}
<|assistant|>\n{% endif %}
# llama 2
{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]{% elif m.role == 'assistant
' %} {{ m.content | trim }} </s>{% endif %}{% endfor %}
# mistral
<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m
.content }}</s>{% endif %}{% endfor %}
# vicuna
<s>{% for m in messages %}{{ m.role | upper }}: {{ m.content }}{{ '</s>' if m.role == 'assistant' else ' ' }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}
# right after a control token
{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}
<s>assistant</s>{% endif %}
"""


def read_templates(text):
    """(the parts of a block's first line, its special tokens, its other added tokens, its template), of each block."""
    for block in text.split("\n# ")[1:]:
        for short, long in SHORT.items():
            block = block.replace(short, long)
        head, *lines = block.strip("\n").split("\n")
        tokens = {
            sign: [w for line in lines if line[:2] == sign for w in line[2:].split(" ")] for sign in ("+ ", "- ")
        }
        template = "".join(line for line in lines if line[:2] not in tokens)
        if template.startswith("TRL: "):
            path = FOLDER / f"{template[5:]}.jinja"
            if not path.exists():
                continue
            template = path.read_text("utf-8")
        added = ([w.replace("\0", "\n") for w in tokens[sign]] for sign in tokens)
        yield head.split(" | "), *added, template.replace("\0", "\n")


# name: (template, special tokens, other added tokens, eos, what ends a turn)
FAMILIES = {name: (text, special, other, *ends) for (name, *ends), special, other, text in read_templates(TEMPLATES)}
SPACED = {name: text for (name,), _, _, text in read_templates(SPACED_TEMPLATES)}
REASONING = [name for name, (template, *_) in FAMILIES.items() if "</think>" in template]
OF_GPT = "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant"
OF_COMMAND = "<|START_THINKING|>They greet.<|END_THINKING|>"
THOUGHT = "<think>\nA greeting.\n</think>\n\nHello"


@pytest.fixture(scope="module")
def family(byte_tokenizer):
    """make(name): that family's tokenizer, one token per byte."""

    def make(name):
        if name not in FAMILIES:
            pytest.skip("needs the package trl")
        template, special, ordinary, eos, _ = FAMILIES[name]
        names = {"bos_token": special[0], "eos_token": eos, "pad_token": eos}
        return byte_tokenizer(template, special, ordinary, **names)

    return make


@pytest.fixture(scope="module")
def spaced_tokenizer():
    """make(template, style): a tokenizer of letters that writes ▁ before text, in one of two ways."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?:<>|/[]\n"
    joined = [("▁", letter) for letter in letters[1:] if letter.isalnum()] + [(":", "▁")]

    def make(template, style):
        vocabulary = {c: i for i, c in enumerate([*letters, *map("".join, joined)])}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, joined))
        if style == "first":
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:  # always, also after a control token, as Llama 2's
            backend.normalizer = tokenizers.normalizers.Sequence(
                [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
            )
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )

    return make


def conversation(*turns, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def rendered(tokenizer, messages, thinking=False):
    """The ids of the conversation as the template itself renders it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=thinking)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check(tokenizer, tokenize, prompt, answer, thinking=False, after="<|endoftext|>", render=rendered):
    """Prompt and answer are the ids of the finished conversation; with the follow-up in it, too."""
    one = tokenize(Interaction(prompt, answer, " Shorter. "))
    told = [*prompt[:-1], {"role": "user", "content": prompt[-1]["content"] + "\n\nNote: Shorter."}]
    turn = {"role": "assistant", "content": answer.rstrip()}
    for ids, messages in ((one.prompt_ids, prompt), (one.teacher_prompt_ids, told)):
        whole, got = render(tokenizer, [*messages, turn], thinking), ids + one.completion_ids
        if tokenize.chat.tail == "":  # the token that ends the turn begins the next message
            assert tokenizer.convert_ids_to_tokens(got.pop()) == tokenize.end_of_turn
        names = tokenizer.convert_ids_to_tokens
        assert got == whole[: len(got)], (names(got[-30:]), names(whole[-30:]))
        rest = tokenizer.decode(whole[len(got) :])
        assert tokenize.chat.asks_always or rest.strip("▁ \n") in ("", after), rest
    return one


@pytest.fixture(autouse=True, scope="module")
def _one_day():
    """What the templates themselves render here must not change at midnight."""
    import transformers.utils.chat_template_utils as utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 1, 31)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "datetime", Day)
        yield


def tokenizer_of(tokenizer, thinking=False, **options):
    if thinking:
        options["chat_template_kwargs"] = {"enable_thinking": True}
    return InteractionTokenizer(tokenizer, "note", chat_template_date="2026-01-31", **options)


def check_one_block(tokenizer, tokenize):
    """An answer with its own reasoning has one block of it."""
    one = tokenize(Interaction(conversation("Hi"), THOUGHT, "Shorter"))
    for prompt in (one.prompt_ids, one.teacher_prompt_ids):
        text = tokenizer.decode(prompt + one.completion_ids)
        assert text.count("<think>") == text.count("</think>") == 1, text
        assert re.search(r"<think>\s*A greeting.\s*</think>\s*Hello", text)
    return one


# Their generation prompts close a block of reasoning that their finished turns do not have: that one is kept.
ONLY_PROMPTED = {
    "gemma 4": "<|turn>model\n<|channel>thought\n<channel|>",
    "command r7b": "<|CHATBOT_TOKEN|><|START_THINKING|><|END_THINKING|><|START_RESPONSE|>",
    "seed oss": "assistant\n<seed:think>\nThe budget is 0, so I answer directly.\n</seed:think>",
}


@pytest.mark.parametrize(
    ("name", "thinking"),
    [(name, False) for name in FAMILIES if name not in ONLY_PROMPTED]
    + [(name, True) for name in [*REASONING, *ONLY_PROMPTED]],
)
def test_ids_are_those_of_the_finished_conversation(family, name, thinking):
    tokenizer = family(name)
    tokenize = tokenizer_of(tokenizer, thinking)
    assert tokenize.end_of_turn == FAMILIES[name][-1]
    for answer in ("Hello", "\n\nHello\n", " two\n\n  lines", "日本 <b> {x}"):
        check(tokenizer, tokenize, conversation("Hi"), answer, thinking)
        prompt = conversation("Hi", "Yes.", "And\nthen?", system="Be brief.")
        check(tokenizer, tokenize, prompt, answer, thinking)


TOKEN = re.compile(r"<\|[^|<>\s]*\|?>|<｜[^<>]*?｜>|<[a-z_]+\|>|</?(?:s|(?:start|end)_of_(?:turn|utterance)|image)>")
# What ends a turn, where several are in a template; Phi-3's end of text is another token.
ENDS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<|eot_id|>", "<|return|>", "<｜end▁of▁sentence｜>")
ENDS += ("<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "</s>")


def templates_of_trl():
    """Each template that TRL ships, and those that reason with thinking on as well."""
    for path in sorted(FOLDER.glob("*.jinja")):
        if not path.stem.endswith("_training"):  # those mark the answers, and render the same
            yield pytest.param(path, False, id=path.stem)
            if "enable_thinking" in path.read_text("utf-8"):
                yield pytest.param(path, True, id=f"{path.stem}, thinking")


@pytest.mark.parametrize(("path", "thinking"), [*templates_of_trl()])
def test_the_templates_that_trl_ships(byte_tokenizer, path, thinking):
    template = path.read_text("utf-8")
    tokens = sorted({*TOKEN.findall(template)} - {"<think>"})
    eos = next((token for token in ENDS if token in tokens), "<eos>")
    names = {"bos_token": "<bos>", "eos_token": eos, "pad_token": "<pad>"}
    blocks = [tag for tag in ("<think>", "</think>") if tag in template]
    tokenizer = byte_tokenizer(template, [*dict.fromkeys([*tokens, *names.values()])], blocks, **names)
    tokenize = tokenizer_of(tokenizer, thinking)

    def render(tokenizer, messages, _):
        """Some templates of models that see take lists of parts."""
        text = tokenize.chat.render(messages, add_generation_prompt=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = [conversation("Hi there"), conversation("A", "B\n\nb", "C?")]
    if "raise_exception('System role not supported')" not in template:
        prompts.append(conversation("A", "B", "C?", system="Be brief."))
    for prompt in prompts:
        for answer in ("Hello", "Hello\n\n  <b>you</b>"):
            check(tokenizer, tokenize, prompt, answer, after=eos, render=render)
        # And a model that answers is asked with what the template renders for that.
        assert tokenizer.decode(tokenize.generation_prompt(prompt)) == tokenize.chat.render(prompt)
    if "</think>" in template:
        check_one_block(tokenizer, tokenize)


@pytest.mark.parametrize("style", ["first", "always"])
@pytest.mark.parametrize("name", SPACED)
def test_no_space_before_an_answer_but_the_templates(spaced_tokenizer, name, style):
    tokenizer = spaced_tokenizer(SPACED[name], style)
    tokenize = tokenizer_of(tokenizer)
    for answer in ("Hello", "so what", "a\nb", "1. x"):
        check(tokenizer, tokenize, conversation("hello"), answer)
        check(tokenizer, tokenize, conversation("hello", "Yes.", "more?"), answer)
    # A control token that is spelled out: no space is added around the text it is in either.
    one = tokenize(Interaction(conversation("a", "b</s>c", "d"), "e</s>f", "x"))
    ids = one.prompt_ids + one.completion_ids[:-1]
    ends = tokenizer.convert_tokens_to_ids("</s>")
    plain = tokenize(Interaction(conversation("a", "bc", "d"), "ef", "x"))
    assert ids.count(ends) == (plain.prompt_ids + plain.completion_ids[:-1]).count(ends)
    said = "".join(tokenizer.convert_ids_to_tokens(ids))
    text = "".join(tokenizer.convert_ids_to_tokens(plain.prompt_ids + plain.completion_ids[:-1]))
    assert said.replace("b</s>c", "bc").replace("e</s>f", "ef") == text


@pytest.mark.parametrize("name", ONLY_PROMPTED)
def test_a_block_of_the_generation_prompt_alone_is_kept(family, name):
    tokenizer, (template, *_) = family(name), FAMILIES[name]
    tokenize = tokenizer_of(tokenizer)
    for answer in ("Hello", "\n\nHello"):
        one = tokenize(Interaction(conversation("Hi"), answer, "x"))
        assert tokenizer.decode(one.prompt_ids).endswith(ONLY_PROMPTED[name])
        text = tokenizer.decode(one.completion_ids)
        assert text == ("Hello" if "trim" in template else answer) + tokenize._control.ending
        assert text.endswith(tokenize.end_of_turn) and tokenize.end_of_turn == FAMILIES[name][-1]
        assert tokenize.said(one.completion_ids) == "Hello"


@pytest.mark.parametrize("name", REASONING)
@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_with_its_own_reasoning_has_one_block(family, name, thinking):
    tokenizer = family(name)
    tokenize = tokenizer_of(tokenizer, thinking)
    one = check_one_block(tokenizer, tokenize)
    # Reasoning whose first tag was in the generation prompt, as it is logged from such models.
    if name in ("qwen 3 thinking", "deepseek r1"):
        cut = tokenize(Interaction(conversation("Hi"), THOUGHT.removeprefix("<think>\n"), "Shorter"))
        texts = [tokenizer.decode(item.prompt_ids + item.completion_ids) for item in (cut, one)]
        assert texts[0] == texts[1]
    # In a history it is the template's to keep or to drop.
    past = conversation("Hi", THOUGHT, "And?")
    history = tokenize(Interaction(past, "Bye", "Shorter"))
    kept = tokenizer.apply_chat_template(past, tokenize=False, **tokenize.chat._options)
    assert tokenizer.decode(history.prompt_ids).startswith(kept)


@pytest.mark.parametrize("name", ["glm 4.5", "smollm 3", "qwen 3"])
def test_the_tags_of_reasoning_are_no_control_tokens(family, name):
    """Though the template writes an empty block into old turns."""
    tokenizer = family(name)
    think = tokenizer.convert_tokens_to_ids("<think>")
    one, other = (
        tokenizer_of(tokenizer)(Interaction(conversation(f"what is {text}?"), f"a {text}", "x"))
        for text in ("<think>", "it")
    )
    for ids, without in ((one.completion_ids, other.completion_ids), (one.prompt_ids, other.prompt_ids)):
        assert ids.count(think) == without.count(think) + 1


def test_white_space_tokens_are_no_control_tokens(family):
    tokenizer = family("gemma 3")
    text = "a\n\nb\nc"
    one = tokenizer_of(tokenizer)(Interaction(conversation(text), "y", "x"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # a newline, or two, is one token
    assert str(ids)[1:-1] in str(one.prompt_ids)


@pytest.mark.parametrize(
    ("name", "generated", "said"),
    [
        ("gpt-oss", f"{OF_GPT}<|channel|>final<|message|>Hi!<|return|>", "Hi!"),
        ("gpt-oss", "<|channel|>final<|message|>Hi!", "Hi!"),
        ("gpt-oss", "<|channel|>analysis<|message|>They gr", ""),
        ("gpt-oss", "Hi!<|return|>", "Hi!"),
        ("qwen 3", "Hi!<|im_end|>", "Hi!"),
        ("qwen 3", "<think>\nThey greet.\n</think>\n\nHi!<|im_end|>", "Hi!"),
        ("qwen 3", "<think>\nThey gr", ""),
        ("qwen 3 thinking", "They greet.\n</think>\n\nHi!<|im_end|>", "Hi!"),
        ("qwen 3 thinking", "They gr", ""),
        ("deepseek r1", "They greet.\n</think>\n\nHi!<｜end▁of▁sentence｜>", "Hi!"),
        ("glm 4.5", "\nHi!<|user|>", "Hi!"),
        ("command", f"{OF_COMMAND}<|START_RESPONSE|>Hi!<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Hi!"),
        ("command", "<|START_THINKING|>They gr", ""),
        ("gemma 4", "<|channel>thought\nThey greet.<channel|>Hi!<turn|>", "Hi!"),
        ("gemma 4", "<|channel>thought\nThey gr", ""),
        ("chatml", "a <think> b </think> c<|im_end|>", "a <think> b </think> c"),
        ("chatml without a generation prompt", " Hi!<|im_end|>", "Hi!"),
    ],
)
def test_what_an_answer_says(family, name, generated, said):
    """Without channels, reasoning and control tokens; all of it stays in what is trained on."""
    tokenizer = family(name)
    tokenize = tokenizer_of(tokenizer)
    ids = tokenizer(generated, add_special_tokens=False)["input_ids"]
    assert tokenize.said(ids) == said
    messages = conversation("Hi")
    one = tokenize(Interaction(messages, "", "Shorter"), ids)
    assert one.completion_ids == ids
    assert one.prompt_ids == tokenize.generation_prompt(messages)
    options = {"tokenize": False, "add_generation_prompt": True, **tokenize.chat._options}
    header = "<|im_start|>assistant\n" if name.endswith("without a generation prompt") else ""
    assert tokenizer.decode(one.prompt_ids) == tokenizer.apply_chat_template(messages, **options) + header


def test_a_response_template_says_what_an_answer_says(family):
    tokenizer = family("qwen 3 thinking")
    fields = {"thinking": {"open": "<think>", "close": "</think>"}, "content": {"close": "<|im_end|>"}}
    tokenizer.response_template = {"version": 1, "start_anchor": "<|im_start|>assistant\n", "fields": fields}
    tokenize = tokenizer_of(tokenizer)
    start = tokenize.generation_prompt(conversation("Hi"))
    for generated, said in (("They greet.\n</think>\n\nHi!<|im_end|>", "Hi!"), ("They gr", ""), ("", "")):
        assert tokenize.said(tokenizer(generated, add_special_tokens=False)["input_ids"], start) == said


def test_plain_roles_and_a_real_vocabulary(smollm2):
    """Where a space begins a word's token, the space before the answer is the answer's."""
    import copy

    tokenizer = copy.deepcopy(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    one = check(tokenizer, tokenizer_of(tokenizer), conversation("Hi", "Yes", "And?"), "Hello there")
    assert tokenizer.convert_ids_to_tokens(one.completion_ids) == ["ĠHello", "Ġthere", "<|im_end|>"]
    assert tokenizer_of(tokenizer).generation_prompt(conversation("Hi", "Yes", "And?")) == (one.prompt_ids)


class TestClock:
    def test_one_date_for_student_teacher_and_neighbours(self, family, monkeypatch):
        import transformers.utils.chat_template_utils as utils

        class Clock(datetime.datetime):
            day = 0

            @classmethod
            def now(cls, tz=None):
                cls.day += 1  # midnight passes between any two renderings
                return datetime.datetime(2026, 1, 1) + datetime.timedelta(days=cls.day)

        monkeypatch.setattr(utils, "datetime", Clock)
        forms = {"gpt-oss": "%Y-%m-%d", "llama 3": "%d %b %Y", "granite": "%d %B %Y", "smollm 3": "%d %B %Y"}
        for name, form in forms.items():
            tokenizer = family(name)
            rendered(tokenizer, conversation("Hi"))
            assert Clock.day > 0  # it is the clock that templates read
            for date in (None, "2025-06-07T08:09:10"):
                tokenize = InteractionTokenizer(tokenizer, "note", chat_template_date=date)
                items = [tokenize(Interaction(conversation(f"Hi {i}"), "y", "o")) for i in range(2)]
                heads = {
                    tokenizer.decode(ids).partition("Hi")[0]
                    for item in items
                    for ids in (item.prompt_ids, item.teacher_prompt_ids)
                }
                assert len(heads) == 1
                day = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
                assert day.strftime(form) in heads.pop()

    def test_every_form_of_a_date(self, byte_tokenizer):
        """As the clock itself writes it, and white space around the template stays."""
        day = datetime.datetime(2025, 6, 7, 8, 9, 10)
        form = "%-d. %B (%b, %m) %Y %A %H:%M:%S %p %j %F %e %T %D"
        template = (
            "\n  {% if strftime_now is defined %}[{{ strftime_now('" + form + "') }}]{% endif %} "
            "{% for m in messages %}{{ m.role }} {{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}"
        )
        tokenizer = byte_tokenizer(template, ["</s>"], eos_token="</s>")
        text = ChatTemplate(tokenizer, date=day).render(conversation("Hi"))
        assert text == f"\n[{day.strftime(form)}] user Hi</s>assistant "


class TestRefused:
    """With a sentence that names the template, shows both texts and says which option helps."""

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            (
                "{% for tool in tools %}{% endfor %}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
                "tokenize_interaction: the chat template of TokenizersBackend fails on the roles user: TypeError: .*; "
                "pass what it asks for as chat_template_kwargs, or set tokenizer.chat_template",
            ),
            (
                "<s>{% for m in messages %}{{ m.text }}</s>{% endfor %}",
                "chat template of .* must write the text of messages, got '<s></s>' for the user's message "
                "'sdpoquestion', and '<s></s></s>' with the answer 'sdpoanswer'; set tokenizer.chat_template",
            ),
            (
                "{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}",
                "must write the text of messages",
            ),
            (
                "{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<s>model</s>{% endif %}",
                r"must begin a finished answer with its generation prompt, got the generation prompt "
                r"'<s>user</s>sdpoquestion</s><s>model</s>' and the finished turn "
                r"'<s>user</s>sdpoquestion</s><s>assistant</s>sdpoanswer'; pass chat_template_kwargs with "
                r"which both agree, or set tokenizer.chat_template",
            ),
            (
                "{% for m in messages %}<s>{{ m.role }}</s>{{ m.content }}</s>{% endfor %}"
                "{% if add_generation_prompt %}<s>assistant</s>"
                "{% if enable_thinking %}{% else %}<s>final</s>{% endif %}{% endif %}",
                r'must begin a finished answer .*\(such as {"enable_thinking": true}\)',
            ),
            (
                "{% for m in messages %}<s>{{ m.role }}:{% if m.role == 'assistant' %}<s>think</s>{% endif %}"
                "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}",
                r"must write '</s>', which ends an answer, after it alone, got '<s>think</s>' before it, where a",
            ),
        ],
    )
    def test_at_the_start(self, byte_tokenizer, template, message):
        tokenizer = byte_tokenizer(template, ["<s>", "</s>"], eos_token="</s>")
        with pytest.raises(ValueError, match=message):
            InteractionTokenizer(tokenizer, "note")
        if "enable_thinking" in template:
            check(tokenizer, tokenizer_of(tokenizer, thinking=True), conversation("Hi"), "Hello")

    def test_a_tokenizer_that_joins_prompt_and_answer(self, spaced_tokenizer):
        import tokenizers

        template = (
            "{% for m in messages %}[{{ m.role }}]:{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]:{% endif %}"
        )
        tokenizer = spaced_tokenizer(template, "first")
        vocabulary = {**tokenizer.get_vocab(), ":s": len(tokenizer)}
        for token in ("<s>", "</s>"):
            del vocabulary[token]
        tokenizer.backend_tokenizer.model = tokenizers.models.BPE(vocabulary, [(":", "s")])
        with pytest.raises(ValueError, match=r"same tokens as the whole turn .* got .*':', 's', 'd'"):
            InteractionTokenizer(tokenizer, "note")

    def test_an_answer_that_the_template_writes_elsewhere(self, byte_tokenizer):
        template = (
            "{% for m in messages %}<s>{{ m.role }}</s>{% if m.content[0] == '\\n' %}<s>{% endif %}"
            "{{ m.content | trim }}{{ '!' if m.content[0] == '\\n' }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
        )
        tokenizer = byte_tokenizer(template, ["<s>", "</s>"], eos_token="</s>")
        tokenize = InteractionTokenizer(tokenizer, "note")
        ids = tokenize(Interaction(conversation("Hi"), "Hello", "o")).completion_ids
        assert tokenizer.decode(ids) == "Hello</s>"
        with pytest.raises(ValueError, match="writes this answer's turn in another way"):
            tokenize(Interaction(conversation("Hi"), "\nHello", "o", id="i3"))

    def test_no_date(self, family):
        with pytest.raises(ValueError, match="chat_template_date must be a date like"):
            InteractionTokenizer(family("gpt-oss"), "note", chat_template_date="tomorrow")


def test_the_published_answer_where_that_is_asked_for(family):
    """`end_of_turn="eos"` keeps the white space that a template drops, and the tokenizer's end."""
    tokenizer = family("llama 3")
    one = tokenizer_of(tokenizer, end_of_turn="eos")(Interaction(conversation("Hi"), "\n\nHello", "o"))
    assert tokenizer.decode(one.completion_ids) == "\n\nHello<|end_of_text|>"
