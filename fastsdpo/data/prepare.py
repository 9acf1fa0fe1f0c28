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

import contextlib
import json
import os
import random
import shutil
import struct
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from fastsdpo.data.filters import ConversationFilter
from fastsdpo.data.interactions import Conversation, Interaction, extract_interactions
from fastsdpo.data.loading import DamagedRecord, LoadReport, expand_source, load_conversations
from fastsdpo.data.merging import MANY_EACH, ONE_EACH, Merged, RecordKeys, merge, record_keys
from fastsdpo.data.progress import ProgressBar

FORMAT = 3  # of the partial folder and its rows; one of another format is started anew
CHECKPOINT_RECORDS = 5000
INDEX_ENTRY = struct.Struct("<QI?")
KEY_BLOCK = struct.Struct("<BI")  # which list, keys
BLOCK_KEYS = 1 << 13
KEY_LISTS = (*ONE_EACH, *MANY_EACH)


@dataclass
class PrepareReport:
    """What `prepare` did; written as JSON beside the output.

    Attributes:
        output, eval_output: the files (eval_output is None where nothing was held out).
        conversations, interactions: written to `output`; eval_*: to `eval_output`.
        merged_records: records that were kept, but as part of a conversation that another record
            of it is counted for.
        duplicate_interactions: interactions left out because an equal one (same prompt, answer
            and follow-up), or a longer record of the same conversation, is there.
        left_out: follow-ups of records that were read and not dropped, but that are in no
            interaction, by reason; counted before records are merged.
        sizes: bytes of the files.
        dropped: records that a rule dropped, by rule, and conversations over the wanted number.
        records, damaged, problems, lost_bytes: as in `LoadReport`.
        settings: what decides the result.
    """

    output: str
    eval_output: str | None
    conversations: int = 0
    interactions: int = 0
    eval_conversations: int = 0
    eval_interactions: int = 0
    merged_records: int = 0
    duplicate_interactions: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    records: int = 0
    damaged: dict[str, int] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    lost_bytes: int = 0
    settings: dict = field(default_factory=dict)


_encode = json.JSONEncoder(ensure_ascii=False).encode


def encode_rows(interactions: list[Interaction], first_turn: int) -> list[bytes]:
    """The lines of a conversation's interactions; a message that is in many is encoded once."""
    encoded: dict[tuple[str, str], str] = {}

    def message(role: str, content: str) -> str:
        text = encoded.get((role, content))
        if text is None:
            text = encoded[role, content] = _encode({"role": role, "content": content})
        return text

    rows = []
    for turn, item in enumerate(interactions, first_turn):
        prompt = ", ".join([message(m["role"], m["content"]) for m in item.prompt])
        row = (
            f'{{"id": {_encode(item.id)}, "conversation_id": {_encode(item.conversation_id)}, '
            f'"turn_id": {turn}, "prompt": [{prompt}], '
            f'"completion": {message("assistant", item.completion)}, '
            f'"user_response": {message("user", item.followup)}}}\n'
        )
        rows.append(row.encode())
    return rows


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
    state = _read_state(partial, settings) if resume else None
    for path in outputs:
        # With a state, what is there may be this run's own; the run that began it was let to.
        if path.exists() and not overwrite and state is None:
            raise FileExistsError(f"prepare: {path} exists; pass --overwrite (overwrite=True) to replace it")
    with _Spool(partial, state) as spool:
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
        _write_outputs(spool, outputs, rules, seed, eval_fraction, result)
        result.sizes = [path.stat().st_size for path in outputs]
        with _atomic_file(report_path) as file:
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
    spool: _Spool,
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


def _has_enough(spool: _Spool, rules: ConversationFilter) -> bool:
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
    spool: _Spool,
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


# The spool


def _read_state(partial: Path, settings: dict) -> dict | None:
    """The state of an interrupted run with these settings, or None."""
    try:
        state = json.loads((partial / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(state, dict) or state.get("settings") != settings:
        return None
    for name, size in state["sizes"].items():
        path = partial / name
        if not path.exists() or path.stat().st_size < size:
            return None
    return state


class _Spool:
    """The partial folder: kept rows, their index and keys, and the state. A context manager; locks it."""

    def __init__(self, partial: Path, state: dict | None):
        partial.mkdir(parents=True, exist_ok=True)
        self.folder = partial
        self._lock = _lock(partial)
        self.dropped: Counter = Counter(state["dropped"] if state else {})
        self.left_out: Counter = Counter(state["left_out"] if state else {})
        self.report: dict = state["report"] if state else {}
        self.complete: bool = state["complete"] if state else False
        self.offsets, self.starts, self.single = array("Q"), array("Q"), bytearray()
        self.rows, self.looked_at, self.enough = 0, 0, False
        if state is None:
            (partial / "state.json").unlink(missing_ok=True)
        names = ("spool.jsonl", "index.bin", "keys.bin")
        sizes = state["sizes"] if state else {}
        self._files = {name: _open_cut(partial / name, sizes.get(name, 0)) for name in names}
        self._blocks = {name: array("Q") for name in KEY_LISTS}
        self._numbers = {name: array("I") for name in MANY_EACH}  # of each key's record
        self._files["index.bin"].seek(0)
        for offset, count, single in INDEX_ENTRY.iter_unpack(self._files["index.bin"].read()):
            self._index(offset, count, single)
        self.size = self._files["spool.jsonl"].seek(0, os.SEEK_END)

    def _index(self, offset: int, count: int, single: bool) -> None:
        self.offsets.append(offset)
        self.starts.append(self.rows)
        self.single.append(single)
        self.rows += count

    def add(self, rows: list[bytes], keys: RecordKeys, single: bool) -> None:
        """The rows of one record, and their keys."""
        data = b"".join(rows)
        self._files["spool.jsonl"].write(data)
        self._files["index.bin"].write(INDEX_ENTRY.pack(self.size, len(rows), single))
        for name, block in self._blocks.items():
            block.extend(getattr(keys, name))
            if name in MANY_EACH:
                numbers = self._numbers[name]
                numbers.extend([len(self.offsets)] * (len(block) - len(numbers)))
            if len(block) >= BLOCK_KEYS:
                self._write_block(name)
        self._index(self.size, len(rows), single)
        self.size += len(data)

    def _write_block(self, name: str) -> None:
        block, numbers = self._blocks[name], self._numbers.get(name, array("I"))
        header = KEY_BLOCK.pack(KEY_LISTS.index(name), len(block))
        self._files["keys.bin"].write(header + block.tobytes() + numbers.tobytes())
        del block[:], numbers[:]

    def _keys(self, name: str, part: int, parts: int) -> Iterator[tuple[int, int]]:
        """The keys of a list of `RecordKeys` with this remainder, and their records' or rows' numbers."""
        first = 0
        with open(self.folder / "keys.bin", "rb") as file:
            while header := file.read(KEY_BLOCK.size):
                which, size = KEY_BLOCK.unpack(header)
                many = KEY_LISTS[which] in MANY_EACH
                block, numbers = array("Q"), array("I")
                if KEY_LISTS[which] != name:
                    skipped = block.itemsize + (numbers.itemsize if many else 0)
                    file.seek(size * skipped, os.SEEK_CUR)
                    continue
                block.fromfile(file, size)
                if many:
                    numbers.fromfile(file, size)
                numbered = zip(block, numbers if many else range(first, first + size))
                first += size
                yield from [item for item in numbered if item[0] % parts == part]

    def _flush(self) -> None:
        for name, block in self._blocks.items():
            if block:
                self._write_block(name)
        for file in self._files.values():
            file.flush()

    def merge(self) -> Merged:
        """The records so far, merged."""
        self._flush()
        return merge(self._keys, self.starts, self.single, self.rows)

    def save(self, settings: dict, report: LoadReport) -> None:
        self._flush()
        sizes = {}
        for name, file in self._files.items():
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        state = {
            "settings": settings,
            "complete": self.complete,
            "sizes": sizes,
            "dropped": self.dropped,
            "left_out": self.left_out,
            "report": vars(report),
        }
        with _atomic_file(self.folder / "state.json") as file:
            file.write(json.dumps(state).encode())

    def read(self, record: int) -> bytes:
        """The rows of a record, as they were added."""
        after = record + 1
        end = self.offsets[after] if after < len(self.offsets) else self.size
        self._files["spool.jsonl"].seek(self.offsets[record])
        return self._files["spool.jsonl"].read(end - self.offsets[record])

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        # Buffered rows that cannot be written (the disk is full) are not lost: resuming reads again.
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):
                file.close()
        if kind is DamagedRecord:  # the sources have to change before this can go on
            shutil.rmtree(self.folder, ignore_errors=True)


def _open_cut(path: Path, size: int) -> Any:
    """Opens for reading and writing at the end, cut to `size` bytes."""
    file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return file


def _lock(folder: Path) -> Any:
    """Keeps a second run away from the folder; the system lifts it when the process ends."""
    file = open(folder / "lock", "wb")  # noqa: SIM115
    try:
        import fcntl
    except ImportError:  # not on Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise FileExistsError(f"prepare: another run is writing to {folder}") from None
    return file


@contextlib.contextmanager
def _atomic_file(path: Path) -> Iterator[Any]:
    """A file that appears at `path` whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    with contextlib.suppress(OSError):  # folders cannot be opened on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# The output


def _write_outputs(
    spool: _Spool,
    outputs: list[Path],
    rules: ConversationFilter,
    seed: int,
    eval_fraction: float,
    result: PrepareReport,
) -> None:
    """Copies the spool to the outputs in the final order, and counts in `result`."""
    merged = spool.merge()
    kept = merged.kept  # of each conversation, which the number of its first record stands for
    order = array("I", (record for record in range(len(kept)) if kept[record]))
    result.merged_records = len(kept) - len(order)
    result.duplicate_interactions = sum(merged.left_out)
    if rules.shuffle:
        random.Random(seed).shuffle(order)
    chosen, rows = 0, 0
    while chosen < len(order):
        count = kept[order[chosen]]
        if rules.max_conversations is not None and chosen >= rules.max_conversations:
            break
        if rules.max_interactions is not None and rows + count > rules.max_interactions:
            break
        chosen, rows = chosen + 1, rows + count
    if chosen < len(order):
        result.dropped["over the wanted number"] = len(order) - chosen
    order = order[:chosen]
    held_out = _held_out(merged.families, order, eval_fraction, seed)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_atomic_file(path)) for path in outputs]
        for conversation in order:
            data = _conversation_rows(spool, merged, conversation)
            if merged.families[conversation] in held_out:
                files[1].write(data)
                result.eval_conversations += 1
                result.eval_interactions += kept[conversation]
            else:
                files[0].write(data)
                result.conversations += 1
                result.interactions += kept[conversation]


def _held_out(families: array, order: array, eval_fraction: float, seed: int) -> set[int]:
    """The families to hold out, so that their conversations are as near to the share as can be.

    Raises:
        ValueError: with any family held out, the share would be further off than with none.
    """
    count = len(order)
    wanted = round(eval_fraction * count)
    if not wanted:
        return set()
    sizes = array("I", [0]) * len(families)
    for conversation in order:
        sizes[families[conversation]] += 1
    draw = random.Random(seed)

    def places() -> Iterator[int]:
        yield from draw.sample(range(count), wanted)  # all, where each conversation is a family
        rest = array("I", range(count))
        draw.shuffle(rest)
        yield from rest

    held_out: set[int] = set()
    found = 0
    for place in places():
        family = families[order[place]]
        after = found + sizes[family]
        if found >= wanted:
            break
        if family not in held_out and after - wanted <= wanted - found and after < count:
            held_out.add(family)
            found = after
    if not held_out:
        raise ValueError(
            f"prepare: eval_fraction must leave whole families of conversations on one side, got "
            f"{eval_fraction}: {max(sizes):,} of {count:,} conversations begin with "
            "the same prompt, so that none can be held out without its prompt in training; hold "
            "out other conversations, or take a larger share"
        )
    return held_out


def _conversation_rows(spool: _Spool, merged: Merged, conversation: int) -> bytes:
    """The rows of a conversation, of all its records, as they are written."""
    if merged.following[conversation] == len(merged.following) and not merged.renamed:
        rows = spool.read(conversation)
        if rows.count(b"\n") == merged.kept[conversation]:
            return rows
    records, changed = [], False
    for record in merged.records(conversation):
        rows, start = spool.read(record), spool.starts[record]
        numbered = enumerate(rows.splitlines(keepends=True), start)
        kept = [(row, data) for row, data in numbered if not merged.left_out[row]]
        changed = changed or any(row in merged.renamed for row, _ in kept)
        records += [kept] if kept else []
    if len(records) == 1 and not changed:
        return b"".join([data for _, data in records[0]])
    rows = [(row, json.loads(data)) for rows in records for row, data in rows]
    name = rows[0][1]["conversation_id"]
    for number, row in rows:
        row["conversation_id"] = name
        if number in merged.renamed:
            row["id"] = f"{row['id']}~{number}"
    rows.sort(key=lambda item: len(item[1]["prompt"]))
    return b"".join([_encode(row).encode() + b"\n" for _, row in rows])
