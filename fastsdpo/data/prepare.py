"""``fastsdpo prepare SOURCE... -o interactions.jsonl``: conversations of any layout -> interactions.

Reads, filters, extracts, merges (merging.py), shuffles and splits, in memory that does not grow with
the text: kept interactions go to a spool file in the order they are read, and 64-bit keys of their
messages to files beside it. In memory stay some 40 bytes for each record and one for each
interaction. The output is copied from the spool in its final order.

An interruption at any point, SIGKILL among them, leaves what was at the output before, or the whole
new file, and a folder ``<output>.partial`` from which the same command goes on to the same result:

    spool.jsonl   rows of the kept records
    index.bin     (offset in the spool, number of rows, whether it is one interaction) of each of them
    keys.bin      blocks of keys, each of one list of `RecordKeys`
    state.json    the settings, the counts, and how much of these files and the sources they stand for

state.json is replaced, atomically, after the other files are on the disk; on resuming, they are cut
back to what it says.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from fastsdpo.data.filters import ConversationFilter
from fastsdpo.data.interactions import Conversation, extract_interactions
from fastsdpo.data.loading import DamagedRecord, LoadReport, expand_source, load_conversations
from fastsdpo.data.merging import record_keys
from fastsdpo.data.output import PrepareReport as PrepareReport
from fastsdpo.data.output import encode_rows as encode_rows
from fastsdpo.data.output import write_outputs
from fastsdpo.data.progress import ProgressBar
from fastsdpo.data.spool import Spool, atomic_file, read_state

FORMAT = 3  # of the partial folder and its rows; one of another format is started anew
CHECKPOINT_RECORDS = 5000


def prepare(
    sources: Sequence[str | PathLike],
    output: str | PathLike,
    *,
    rules: ConversationFilter | str = "default",
    seed: int = 42,
    eval_fraction: float = 0.0,
    eval_output: str | PathLike | None = None,
    limit: int | None = None,
    config: str | None = None,
    split: str = "train",
    strict: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = False,
) -> PrepareReport:
    """Writes the interactions of the sources' conversations to `output`, atomically.

    Records of one conversation are merged, and each interaction is written once; see merging.py.
    The same arguments and sources give the same bytes.

    Args:
        sources: what `load_conversations` takes.
        output: the JSON Lines file to write; the report goes beside it (``.report.json``).
        rules: a `ConversationFilter`, or a preset's name.
        seed: of the order and of the choice of conversations that are held out.
        eval_fraction: share of the conversations to hold out, in `eval_output`
            (``<output>.eval.jsonl`` where not given). Conversations that begin alike (a prompt of
            one begins a prompt of the other) are held out together or not at all, so that the
            share can only be met as nearly as they allow.
        limit: read at most so many records.
        config, split: of a Hugging Face dataset.
        strict: stop at the first record that is damaged or holds no interaction.
        overwrite: replace an output that exists.
        resume: go on where an interrupted run with the same settings stopped; where one has
            finished, its report is returned and nothing is done.
        progress: show a progress bar on the terminal.

    Raises:
        FileExistsError: the output exists and is not to be replaced.
        DamagedRecord, FileNotFoundError, ImportError: from `load_conversations`.
        ValueError: an argument is out of range, or nothing can be held out, because (nearly) all
            conversations begin alike.
        OSError: the output cannot be written; what was read so far is kept for resuming.
    """
    rules = ConversationFilter.preset(rules) if isinstance(rules, str) else rules
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"prepare: eval_fraction must be in [0, 1), got {eval_fraction}")
    if limit is not None and limit < 1:
        raise ValueError(f"prepare: limit must be at least 1, got {limit}")
    output = Path(output)
    if eval_fraction == 0:
        if eval_output is not None:
            raise ValueError("prepare: eval_output needs an eval_fraction above 0")
    elif eval_output is None:
        eval_output = output.with_name(f"{output.stem}.eval{output.suffix}")
    outputs = [output] + ([] if eval_output is None else [Path(eval_output)])
    if len({path.absolute() for path in outputs}) != len(outputs):
        raise ValueError(f"prepare: eval_output must differ from output, got {output} for both")
    settings = {
        "format": FORMAT,
        "sources": [_identity(item) for item in expand_source(sources)],
        "rules": json.loads(json.dumps(asdict(rules))),
        "seed": seed,
        "eval_fraction": eval_fraction,
        "limit": limit,
        "config": config,
        "split": split,
        "strict": strict,
        "outputs": [str(path.absolute()) for path in outputs],
    }

    partial = output.with_name(output.name + ".partial")
    report_path = output.with_name(f"{output.stem}.report.json")
    if resume and not overwrite:
        finished = _read_report(report_path, outputs, settings)
        if finished is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return finished
    state = read_state(partial, settings) if resume else None
    for path in outputs:
        # With a state, what is there may be this run's own; the run that began it was let to.
        if path.exists() and not overwrite and state is None:
            raise FileExistsError(f"prepare: {path} exists; pass --overwrite (overwrite=True) to replace it")
    with Spool(partial, state) as spool:
        report = LoadReport(**{**spool.report, "damaged": Counter(spool.report.get("damaged"))})
        if not spool.complete:
            with ProgressBar(report, progress) as bar:
                _read(spool, report, sources, rules, limit, config, split, strict, settings, bar)
        result = PrepareReport(
            output=str(output),
            eval_output=None if eval_output is None else str(eval_output),
            left_out=dict(spool.left_out),
            dropped=dict(spool.dropped),
            records=report.records,
            damaged=dict(report.damaged),
            problems=report.problems,
            lost_bytes=report.lost_bytes,
            settings=settings,
        )
        write_outputs(spool, outputs, rules, seed, eval_fraction, result)
        result.sizes = [path.stat().st_size for path in outputs]
        with atomic_file(report_path) as file:
            file.write(json.dumps(asdict(result), indent=2, ensure_ascii=False).encode() + b"\n")
    shutil.rmtree(partial)
    return result


def _read_report(path: Path, outputs: list[Path], settings: dict) -> PrepareReport | None:
    """The report of a run with these settings that has finished, its outputs still there."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        sizes = [output.stat().st_size for output in outputs]
        if report["settings"] == settings and report["sizes"] == sizes:
            return PrepareReport(**report)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return None


def _identity(item: Path | str) -> list:
    """What tells that a source is still the same when a run is resumed."""
    if isinstance(item, str):
        return [item]
    status = item.stat()
    return [str(item.absolute()), status.st_size, status.st_mtime_ns]


def _read(
    spool: Spool,
    report: LoadReport,
    sources: Sequence[str | PathLike],
    rules: ConversationFilter,
    limit: int | None,
    config: str | None,
    split: str,
    strict: bool,
    settings: dict,
    bar: ProgressBar,
) -> None:
    """Sources -> spool, going on after ``report.position``."""
    conversations = load_conversations(
        list(sources),
        strict=strict,
        report=report,
        config=config,
        split=split,
        position=report.position,
    )
    saved = report.records
    while not (limit is not None and report.records >= limit) and not _has_enough(spool, rules):
        conversation = next(conversations, None)
        if conversation is None:
            break
        _keep(spool, report, conversation, rules, strict)
        if report.records - saved >= CHECKPOINT_RECORDS:
            spool.save(settings, report)
            saved = report.records
        bar.update()
    spool.complete = True
    spool.save(settings, report)


def _has_enough(spool: Spool, rules: ConversationFilter) -> bool:
    """Without shuffling, the first conversations are the wanted ones: whether they are all read.

    Looks when the number of records is a power of two, so that merging them each time stays cheap,
    and a run that is resumed stops where it would have stopped.
    """
    records = len(spool.offsets)
    limits = (rules.max_conversations, rules.max_interactions)
    if rules.shuffle or limits == (None, None) or records & (records - 1) or not records:
        return False
    if spool.looked_at != records:
        spool.looked_at = records
        kept = [count for count in spool.merge().kept if count]
        spool.enough = any(
            limit is not None and found >= limit for limit, found in zip(limits, (len(kept), sum(kept)))
        )
    return spool.enough


def _keep(
    spool: Spool,
    report: LoadReport,
    conversation: Conversation,
    rules: ConversationFilter,
    strict: bool,
) -> None:
    reason = rules.reason_to_drop(conversation)
    if reason is not None:
        spool.dropped[reason] += 1
        return
    source = report.position["source"] if report.position else 0
    if conversation.id is None:
        # The place where it was read names it, so that its interactions stay together.
        conversation = replace(conversation, id=os.path.basename(report.where))
    if source and conversation.own_id:
        # Another source may have given the same name to another record.
        conversation = replace(conversation, id=f"{source}/{conversation.id}")
    turns = sum(message["role"] == "assistant" for message in conversation.messages)
    if conversation.single and conversation.interaction_id is None:
        conversation = replace(conversation, interaction_id=f"{conversation.id}:{turns - 1}")
    left_out: Counter = Counter()
    interactions = extract_interactions(
        conversation, max_history_messages=rules.max_history_messages, left_out=left_out
    )
    spool.left_out.update(left_out)
    if not interactions:
        kind, problem = "no follow-up", "no answer is followed by a user's message"
        if left_out:
            kind = problem = f"nothing but follow-ups {' and '.join(left_out)}"
        message = f"{report.where}: {problem}"
        if strict:
            raise DamagedRecord(message)
        report.add_problem(kind, message)
        return
    rows = encode_rows(interactions, turns - 1 if conversation.single else 0)
    spool.add(rows, record_keys(conversation, interactions), conversation.single)
