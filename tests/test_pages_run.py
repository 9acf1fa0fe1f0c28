"""Every command and Python block of the pages runs as it stands there, in the page's order, a folder for each page.

A tiny model stands in for the models that pages name, rows of their kind for data sets of the hub, a server on this
machine for judges and users, and small counts are added. README.md is run by test_docs.py, docs/distributed.md
by trainer/test_documented_launches.py, and docs/integrations by integrations/test_pages.py.
"""

import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastsdpo.cli import main
from tests.pages import NAMES, ROOT, blocks, calls
from tests.servers import serving

RUN = "interactions.jsonl --model Qwen/Qwen3-0.6B -o runs/first"
# What is not run here, by how it starts.
SKIPPED = {
    "pip install": "changes the environment",
    "make demo": "installs everything and trains a real model; test_examples.py runs it with a tiny one",
    "bash recipes/": "test_recipes.py runs every recipe",
    "MODEL=Qwen/Qwen3-4B bash recipes/": "test_recipes.py runs every recipe",
    "TINY_MODEL=path/to/a/small/model bash recipes/": "test_recipes.py runs every recipe",
    "vllm serve": "needs vLLM and a GPU",
    "git clone https://github.com/ggml-org/llama.cpp": "downloads another project",
    "python llama.cpp/": "a program of another project",
    "llama.cpp/build/bin/": "a program of another project",
    "fastsdpo train - --stream": "reads the process's own standard input; trainer/test_stream.py pipes rows into it",
    "fastsdpo train OWNER/DATASET --stream": "reads the hub; trainer/test_stream.py has a stand-in of it",
    f"fastsdpo train {RUN} --lora 16 --learning-rate 2e-5 --push-to-hub": "uploads; test_train_command.py does",
}
ELSEWHERE = ("distributed",)
QUICK = ("choosing",)
# Added to a command, so that it takes a second.
SMALL = {
    "train": "--max-steps 2 --batch-size 2",
    "online": "--max-steps 2 --batch-size 2 --max-new-tokens 8 --set eval_max_new_tokens=8",
    "chat": "--max-new-tokens 8",
    "eval": "--max-new-tokens 8",
}
TYPED = "Hello!\n/teach Shorter, please.\n/undo\n"
PAGES = [
    page
    for page in sorted((ROOT / "docs").glob("*.md"))
    if page.stem not in ELSEWHERE and (blocks(page, "bash") or blocks(page, "python"))
]


def skipped(text):
    return next((start for start in SKIPPED if text.startswith(start)), None)


@pytest.fixture
def endpoint():
    """A server that a judge and a user can be: its first word is a verdict."""

    reply = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "A"}}]}
    with serving(lambda path, body: (200, reply)) as url:
        yield f"{url}/v1"


def lines(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def say(*texts):
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def questions():
    texts = ["Why is the sky blue?", "What is a prime number?", "Who wrote Faust?", "How deep is the sea?"]
    Path("prompts.txt").write_text("".join(text + "\n" for text in texts))
    Path("held_out.txt").write_text("How far is the moon?\nWhat is rust?\n")


def logged():
    assert main(["demo-data", "conversations.jsonl"]) == 0
    assert main(["prepare", "conversations.jsonl", "-o", "interactions.jsonl", "--quiet"]) == 0


def adapter(tiny, output, *more):
    """A run of two steps, with checkpoints."""
    questions()
    user = ["--rule", "max_words=2", "--wish", "Shorter.", "--lora", "2", "--save-steps", "1", *more]
    assert main(["online", "prompts.txt", "--model", str(tiny), "-o", output, *user, *SMALL["online"].split()]) == 0


def data_page(tiny):
    assert main(["demo-data", "logs/monday.jsonl"]) == 0
    turns = [{"author": {"role": m["role"]}, "text": m["content"]} for m in say("Name a tree.", "Oak.", "In Latin.")]
    lines("logs.jsonl", [{"chat": {"items": turns}, "meta": {"thread": "t1"}}])
    with open("desk.csv", "w", newline="") as file:
        rows = [(7, "customer", "It broke."), (7, "agent", "Restart it."), (7, "customer", "I did.")]
        csv.writer(file).writerows([("ticket", "who", "said"), *rows])
    for part in ("1", "2"):
        said = {"completion": f"Oak {part}.", "user_response": "No."}
        rows = [{"id": f"{part}:{n}", "prompt": say(f"Name {n} trees."), **said} for n in range(4)]
        with gzip.open(f"part-{part}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    lines("held-out.jsonl", [{"prompt": say("Who?"), "completion": "Oak.", "user_response": "In Latin."}])
    ratings = [{"rating": "down"}, {"rating": "down", "rating_comment": "It is four."}, {"rating": "up"}]
    chats = [{"messages": say(f"What is 2 + {n}?", "Five.")} for n in range(len(ratings))]
    for chat, rating in zip(chats, ratings):
        chat["messages"][-1].update(rating)
    Path("chats.json").write_text(json.dumps(chats))


def evaluation_page(tiny):
    pytest.importorskip("if_verifiable")
    adapter(tiny, "runs/brief", "--save-total-limit", "9")
    Path("judge.txt").write_text("{persona}\n{history}\nFirst: {first}\nSecond: {second}\nWhich is better, A, B or C?")
    checked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    lines("input_data.jsonl", [{"key": 1, "prompt": "Hi", **checked}])
    Path("alpaca_eval.json").write_text(json.dumps([{"instruction": "Hi", "dataset": "helpful_base"}]))
    lines("question.jsonl", [{"uid": "a", "prompt": "Hi", "category": "hard_prompt"}])


def tutorial_page(tiny):
    questions()
    shutil.copytree(tiny, "demo_output/base")
    for name in ("prompts.txt", "held_out.txt"):
        shutil.move(name, f"demo_output/{name}")


PLACES = {
    "choosing": lambda tiny: logged(),
    "data": data_page,
    "evaluation": evaluation_page,
    "online": lambda tiny: questions(),
    "serving": lambda tiny: adapter(tiny, "runs/first"),
    "tutorial": tutorial_page,
}


def hub(name, subset, *, split, streaming):
    """Rows as the data sets on the hub have them."""
    texts = [(f"Name {count} trees.", "Oak.", "In Latin.") for count in ("two", "three", split)]
    both = {"language": "English", "model": "m", "timestamp": "2024-01-01"}
    speakers = ("human", "gpt", "human")
    sets = {
        ("allenai/WildChat", None): [{"conversation_id": t[0], "conversation": say(*t), **both} for t in texts],
        ("microsoft/WildFeedback", "wildfeedback"): [
            {"conversations": [{"from": who, "value": text} for who, text in zip(speakers, t)]} for t in texts
        ],
        ("openai/summarize_from_feedback", "comparisons"): [{"info": {"id": t[0], "post": t[0]}} for t in texts],
        ("nvidia/HelpSteer2", None): [{"prompt": t[0], "response": t[1], "helpfulness": 4} for t in texts],
    }
    assert streaming and split in ("train", "validation")
    return pytest.importorskip("datasets").Dataset.from_list(sets[name, subset]).to_iterable_dataset()


def run(call, local, monkeypatch):
    """Runs one command of a page, with ``local`` in the place of names that are not here."""
    text = shlex.join(call.words)
    words = [local.get(word, word) for word in call.words]
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    typed = subprocess.run(call.piped, capture_output=True, text=True, check=True).stdout if call.piped else TYPED
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    if words[:2] == ["python", "-c"]:
        subprocess.run([sys.executable, *words[1:]], check=True)
        return
    assert words[0] == "fastsdpo", f"neither run nor in SKIPPED: {text}"
    more = [] if "--dry-run" in words else SMALL.get(words[1], "").split()
    with contextlib.ExitStack() as stack:
        if call.file:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(call.file, "w"))))
        try:
            status = main([*words[1:], *more])
        except SystemExit as ended:  # after --schema
            status = ended.code or 0
    assert status == 0, text
    made = [word for before, word in itertools.pairwise(words) if before in ("-o", "--output", "--html")]
    for name in filter(None, (*made, call.file)):
        assert Path(name).is_dir() or Path(name).stat().st_size, f"{text}: no {name}"


def execute(block, local):
    """Writes a Python block to the file that its first line names, or runs it."""
    named = re.match(r"# (\w+\.py)\n", block)
    if named:
        Path(named[1]).write_text(block, "utf-8")
        return
    for name, value in local.items():
        block = block.replace(f'"{name}"', repr(value))
    exec(compile(block, "block", "exec"), {})


def marked(page):
    return pytest.param(page, id=page.stem, marks=() if page.stem in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_the_page_runs(page, tiny, endpoint, tmp_path, monkeypatch):
    if page.stem == "paper-data":
        monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # where the folder of --redact is added
    local = {**dict.fromkeys(NAMES, str(tiny)), "http://localhost:8000/v1": endpoint}
    PLACES.get(page.stem, lambda tiny: None)(tiny)
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        if language == "python":
            execute(block, local)
            continue
        for call in calls(block):
            variable = re.fullmatch(r"([A-Z]+)=(.*)", call.words[0])
            if variable and len(call.words) == 1:
                local["$" + variable[1]] = variable[2]
            elif not skipped(shlex.join(call.words)):
                run(call, local, monkeypatch)


def test_what_is_skipped_stands_on_a_page():
    texts = [shlex.join(call.words) for page in PAGES for block in blocks(page, "bash") for call in calls(block)]
    assert {skipped(text) for text in texts} - {None} == SKIPPED.keys()
