"""`fastsdpo prepare --prompts`: rows as the public data sets have them -> what `PromptDataset` reads."""

import json
from types import SimpleNamespace

import pytest

from fastsdpo.commands.prepare import main
from fastsdpo.online import PromptDataset

from .conftest import read_rows

FORM = "SUBREDDIT: r/AskReddit\n\nTITLE: To TITLE: or not\n\nPOST: {}\n\nTL;DR:"
LONGEST = "p" * (1023 - len("\nTL;DR:\n"))


def comparison(post=None, **info):
    """A row of openai/summarize_from_feedback."""
    return {"info": {"id": "t3", "post": post, "title": "T", **info}, "summaries": [{"text": "s"}], "choice": 0}


def turn(prompt, response="An answer."):
    """A row of nvidia/HelpSteer2."""
    return {"prompt": prompt, "response": response, "helpfulness": 4, "verbosity": 2}


@pytest.fixture
def prompts(tmp_path, capsys):
    """prompts(data_set, records, *argv, held_out=records): the texts that are read from both files, and the table."""

    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    def run(data_set, records, *argv, held_out=None):
        output, eval_output = tmp_path / "out.jsonl", tmp_path / "out.eval.jsonl"
        more = [] if held_out is None else ["--eval-source", write("eval.jsonl", held_out)]
        source = write("train.jsonl", records)
        status = main([source, "-o", str(output), "--prompts", data_set, *more, *map(str, argv)])
        said = capsys.readouterr()
        assert all(row.keys() == {"prompt"} for row in read_rows(output) + read_rows(eval_output))
        found = [
            [m[-1]["content"] for m in PromptDataset.from_source(path, "prompts").prompts] if path.exists() else []
            for path in (output, eval_output)
        ]
        status = {"status": status, "table": said.out, "error": said.err}
        return SimpleNamespace(texts=found[0], held_out=found[1], report=tmp_path / "out.report.json", **status)

    return run


@pytest.mark.parametrize(
    ("data_set", "record", "wanted"),
    [
        ("tldr", comparison(" My post.\n"), "My post."),
        ("tldr", comparison(None, article="News."), "News."),
        ("tldr", comparison("Ends with\nTL;DR:"), "Ends with\nTL;DR:"),
        ("tldr", {"prompt": FORM.format("My post.\nPOST: twice"), "completion": " s"}, "My post.\nPOST: twice"),
        ("tldr", {"prompt": FORM.format("My post.") + " ", "label": "s"}, "My post."),
        ("tldr", {"prompt": "No form.\nTL;DR:\n", "label": "s"}, "No form."),
        ("tldr", {"post": "My post.", "summary": "s"}, "My post."),
        ("tldr", comparison(LONGEST), LONGEST),
        ("tldr", comparison(LONGEST + "p"), "of 1,024 characters or more with the suffix"),
        ("tldr", comparison(" "), "without a post"),
        ("helpsteer2", turn(" c# or java? "), "c# or java?"),
        ("helpsteer2", turn("p" * 2048, "r" * 2048 + " "), "p" * 2048),
        ("helpsteer2", turn("p" * 2049), "with a prompt over 2,048 characters"),
        ("helpsteer2", turn("q", "r" * 2049), "with an answer over 2,048 characters"),
        ("helpsteer2", turn("q", " "), "without a prompt or an answer"),
        ("helpsteer2", turn("a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"), "of several turns (<extra_id_1>)"),
        ("tldr", {"text": "x"}, "a record must have info or post or prompt, got 'text'"),
        ("helpsteer2", {"prompt": ["x"], "response": "y"}, "prompt must be text, got list"),
    ],
)
def test_rows_of_the_data_sets(prompts, data_set, record, wanted):
    other = comparison("other") if data_set == "tldr" else turn("other")
    done = prompts(data_set, [record, other])
    assert done.texts == ([wanted] if wanted not in done.table else []) + ["other"]
    assert done.texts == ["other"] or wanted in done.texts


def test_nothing_twice_and_nothing_on_both_sides(prompts):
    posts = ["One post", "two", "ONE  post\n", "three", "two"]
    held_out = ["Three ", "four", "FOUR", "five"]
    done = prompts("tldr", map(comparison, posts), held_out=map(comparison, held_out))
    assert (done.texts, done.held_out) == (["One post", "two", "three"], ["four", "five"])
    for line in ("read              9 records", "kept              3 prompts", "held out          2 prompts"):
        assert line in done.table
    assert "dropped           3 that are there already" in done.table
    assert "dropped           1 that are in the other file" in done.table
    assert json.loads(done.report.read_text())["eval_prompts"] == 2
    again = prompts("tldr", map(comparison, posts))
    assert again.status == 1 and "exists; pass --overwrite" in again.error
    # Two answers to each prompt are two rows; the case of a prompt matters here.
    pairs = [turn("a"), turn("a", "b" * 3000), turn("A"), turn("b", "c" * 3000), turn("b")]
    assert prompts("helpsteer2", pairs, "--overwrite").texts == ["a", "A", "b"]
    shares = prompts("helpsteer2", [turn(str(n)) for n in range(20)], "--overwrite", "--eval-fraction", 0.25)
    assert len(shares.held_out) == 5 and sorted(shares.texts + shares.held_out, key=int) == list(map(str, range(20)))


def test_a_number_of_them_is_drawn_as_datasets_shuffles(prompts):
    datasets = pytest.importorskip("datasets")
    records = [turn(str(n)) for n in range(30)]
    wanted = datasets.Dataset.from_list(records).shuffle(seed=42).select(range(7))["prompt"]
    done = prompts("helpsteer2", records, "--max-prompts", 7, "--max-eval-prompts", 3, held_out=map(turn, "abcdef"))
    assert done.texts == list(wanted) and len(done.held_out) == 3
    assert "dropped          26 over the wanted number" in done.table


def test_tokens_are_those_that_the_model_reads(prompts, smollm2, tmp_path):
    """The chat template and the system prompt count, as in the published training."""
    smollm2.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "system.txt").write_text("Be brief.\n")
    words = ["one two three", "one two three four"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": words[0]}]
    count = len(smollm2.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    options = ("--tokenizer", tmp_path / "tokenizer", "--system", f"@{tmp_path / 'system.txt'}")
    done = prompts("tldr", map(comparison, words), *options, "--max-prompt-tokens", count)
    assert done.texts == words[:1] and f"dropped           1 over {count} tokens" in done.table
    done = prompts("tldr", map(comparison, words), *options, "--overwrite", "--max-prompt-tokens", count - 1)
    assert done.status == 1 and "no prompt was kept for" in done.error and f"2 over {count - 1} tokens" in done.error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--prompts tldr --preset wildchat", "--preset has no meaning with --prompts"),
        ("--prompts tldr --keep model", "--keep has no meaning with --prompts"),
        ("--max-prompts 3", "--max-prompts has no meaning without --prompts"),
        ("--prompts tldr --system x", "--system counts tokens, and needs --tokenizer"),
        ("--prompts tldr --max-prompts 0", "--max-prompts must be at least 1, got 0"),
        ("--prompts tldr --max-eval-prompts 3", "nothing is held out; name eval_source"),
        ("--prompts tldr --eval-split validation", "--eval-split must go with a dataset, got a file"),
        ("--prompts tldr --eval-fraction 0.1 --eval-split validation", "hold out by one of eval_source, eval_split"),
        ("--prompts tldr --tokenizer /no/such", "no such file or folder: /no/such"),
    ],
)
def test_refusals(tmp_path, capsys, options, said):
    (tmp_path / "in.jsonl").write_text(json.dumps(comparison("x")))
    assert main([str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *options.split()]) == 1
    assert said in capsys.readouterr().err and not list(tmp_path.glob("out*"))
