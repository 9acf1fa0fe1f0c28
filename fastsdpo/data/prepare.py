"""Turns conversations of any layout into a file of interactions; the work of `fastsdpo prepare`.

It reads, filters, extracts, merges (merging.py), shuffles and splits, in memory that does not grow with the
text. Kept interactions go to temporary files (spool.py) in the order they are read, and are copied from there
in the final order (output.py). If both orders are the same, the temporary file becomes the output.

Every file that is written appears whole, or not at all. A run that is killed leaves a folder
``<output>.partial``; the same command starts anew, replaces what that run has written, and comes to the
same bytes.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from fastsdpo.data.answers import RatingFollowups
from fastsdpo.data.filters import ConversationFilter
from fastsdpo.data.output import LAYOUTS, TRL_KEYS, NothingKept, atomic_file, write_outputs
from fastsdpo.data.output import PrepareReport as PrepareReport
from fastsdpo.data.output import encode_rows as encode_rows
from fastsdpo.data.progress import ProgressBar
from fastsdpo.data.published import PublishedReader
from fastsdpo.data.readers.registry import RecordParser
from fastsdpo.data.reading import BatchReader, ReadOptions, ReadReport, seldom_collected
from fastsdpo.data.record_fields import RecordFields
from fastsdpo.data.redaction import redaction_settings
from fastsdpo.data.sources import expand_source, name_outputs
from fastsdpo.data.spool import Spool, read_settings
from fastsdpo.data.times import parse_time
from fastsdpo.data.workers import Workers, can_share, cut, default_workers

FORMAT = 5  # of the rows; where a run of another format has finished, that is no reason to do nothing


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
    redact: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    progress: bool = False,
    keep: Sequence[str] = (),
    eval_after: str | float | None = None,
    layout: str = "fastsdpo",
    parser: RecordParser | None = None,
    rating_followups: RatingFollowups | None = None,
) -> PrepareReport:
    """Writes the interactions of the sources' conversations to `output`, whole or not at all.

    Records of one conversation are merged, and each interaction is written once (merging.py). The same
    arguments and sources give the same bytes. Where no interaction is kept, no file is written.

    Args:
        sources: what `load_conversations` takes.
        output: the JSON Lines file to write; the report goes beside it (``.report.json``).
        rules: a `ConversationFilter`, or a preset's name.
        seed: decides the order, and which conversations are held out.
        eval_fraction: share of the conversations to hold out. Conversations that begin alike (a prompt of
            one begins a prompt of the other) are held out together or not at all.
        eval_output: the file for held-out conversations; None: ``<output>.eval.jsonl``.
        limit: read at most this many records.
        config, split: the configuration and split of a Hugging Face dataset.
        strict: stop at the first record that is damaged or holds no interaction.
        redact: ``module:function``, the name of a function text -> text. It is applied to the text of each
            message and to all text in the fields of a record, before anything else is done with them.
        workers: processes that read. They change nothing in the outputs. Files of JSON Lines that are not
            compressed are shared among them, and the files of a Hugging Face dataset; every other source is
            read by one. With `limit`, with a number of conversations or interactions and no shuffling, and for
            the presets of the paper, one process reads. None: one for each core, at most 8, from 32 MB of JSON
            Lines on and for datasets; else 1.
        overwrite: replace an output that exists.
        resume: if a run with the same settings has finished, return its report and do nothing; if one was
            killed, replace what it has written.
        progress: show a progress bar on the terminal.
        keep: keys whose values are copied from a record to its rows; null if the record has no such key.
        eval_after: hold out the conversations from this time on (`times.parse_time`), in place of a
            fraction. A later conversation that begins like an earlier one is left out. A record without a time
            is dropped.
        layout: "fastsdpo", or "trl": the answer is a list of one message, which TRL's trainers read.
        parser: how records are parsed; None finds the layout of each record by its keys.
        rating_followups: texts to use as follow-ups to answers that the user rated but did not reply to.

    Raises:
        FileExistsError: the output exists and is not to be replaced, or another run is writing it.
        DamagedRecord, FileNotFoundError, ImportError: from `load_conversations`.
        ChildProcessError (an OSError): a worker was killed.
        ValueError: an argument is out of range; `redact` cannot be loaded or has failed (the text names the
            record); nothing can be held out, because (nearly) all conversations begin alike.
        OSError: the output cannot be written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"prepare: workers must be at least 1, got {workers}")
    job = _Job(
        sources,
        Path(output),
        rules,
        seed,
        eval_fraction,
        eval_output,
        limit,
        config,
        split,
        strict,
        redact=redact,
        keep=keep,
        eval_after=eval_after,
        layout=layout,
    )
    job.set_layout(RecordParser() if parser is None else parser, rating_followups)
    if resume and not overwrite and (finished := job.finished_report()) is not None:
        shutil.rmtree(job.partial, ignore_errors=True)
        return finished
    job.check_outputs(overwrite, resume)
    in_order = not job.rules.shuffle and len(job.outputs) == 1
    with Spool(job.partial, job.settings, in_order=in_order) as spool:
        if job.rules.published is not None:
            reader = PublishedReader(job, spool)
            with ProgressBar(reader.report, progress) as bar:
                reader.read(bar)
            return job.write(spool, reader.report, reader.order())
        report = ReadReport()
        with ProgressBar(report, progress) as bar:
            job.read(spool, report, bar, workers)
        return job.write(spool, report, None)


class _Job:
    """The checked arguments of a run, and its files.

    Attributes:
        items: files and datasets to read.
        options: how they are read.
        outputs: the output, and the file of the held-out part where there is one.
        settings: all that decides the result, as JSON has it.
    """

    def __init__(
        self,
        sources: Sequence[str | PathLike],
        output: Path,
        rules: ConversationFilter | str,
        seed: int,
        eval_fraction: float,
        eval_output: str | PathLike | None,
        limit: int | None,
        config: str | None,
        split: str,
        strict: bool,
        *,
        redact: str | None,
        keep: Sequence[str],
        eval_after: str | float | None,
        layout: str,
    ):
        self.rules = ConversationFilter.preset(rules) if isinstance(rules, str) else rules
        self.seed = seed
        if layout not in LAYOUTS:
            raise ValueError(f"prepare: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.eval_after = None if eval_after is None else _time("eval_after", eval_after)
        facts = self.rules.facts if self.eval_after is None else dict.fromkeys(("time", *self.rules.facts))
        fields = RecordFields(tuple(keep), tuple(facts))
        if layout == "trl" and (names := set(keep) & TRL_KEYS):
            raise ValueError(f"prepare: keep must not name what TRL reads in the rows' place, got {min(names)!r}")
        if eval_after is not None and eval_fraction > 0:
            raise ValueError("prepare: hold out by eval_fraction or by eval_after, got both")
        if not 0 <= eval_fraction < 1:
            raise ValueError(f"prepare: eval_fraction must be in [0, 1), got {eval_fraction}")
        if limit is not None and limit < 1:
            raise ValueError(f"prepare: limit must be at least 1, got {limit}")
        holds_out = eval_fraction > 0 or eval_after is not None
        if eval_output is not None and not holds_out:
            raise ValueError("prepare: eval_output needs an eval_fraction above 0, or eval_after")
        self.outputs = name_outputs(output, eval_output, holds_out)
        self.partial = output.with_name(output.name + ".partial")
        self.report_path = output.with_name(f"{output.stem}.report.json")
        self.items = self._sources(sources)
        self.options = ReadOptions(self.rules, limit, config, split, strict, redact, fields, self.eval_after, layout)
        self.settings = {
            "format": FORMAT,
            "sources": [_identity(item) for item in self.items],
            "rules": json.loads(json.dumps(asdict(self.rules))),
            "seed": seed,
            "eval_fraction": eval_fraction,
            "limit": limit,
            "config": config,
            "split": split,
            "strict": strict,
            "redact": None if redact is None else redaction_settings(redact),
            "keep": list(keep),
            "eval_after": self.eval_after,
            "layout": layout,
            "outputs": [str(path.absolute()) for path in self.outputs],
        }

    def _sources(self, sources: Sequence[str | PathLike]) -> list[Path | str]:
        """What to read: not what this command writes, where that lies in a folder to read.

        Raises:
            ValueError: a file to read would be replaced.
        """
        own = {path.resolve() for path in (*self.outputs, self.report_path, self.partial)}
        for source in sources:
            if Path(source).resolve() in own:
                raise ValueError(f"prepare: output must be another file than what is read, got {source} for both")
        items = [
            item for item in expand_source(sources) if isinstance(item, str) or own.isdisjoint(_with_folders(item))
        ]
        if not items:
            raise FileNotFoundError("prepare: the sources hold nothing but what this command has written")
        return items

    def set_layout(self, parser: RecordParser, rating_followups: RatingFollowups | None) -> None:
        """What reads the records; a part of the settings where it is not the default."""
        if self.rules.published is not None and (parser.settings or rating_followups is not None):
            raise ValueError(
                "prepare: the presets of the paper read their data set's own form; leave out --format, --map, "
                "--reader, --branches and --rating-followup, or take the preset without paper-"
            )
        self.options = replace(self.options, parser=parser, rating_followups=rating_followups)
        self.settings.update(parser.settings)
        if rating_followups is not None:
            self.settings["rating_followups"] = rating_followups.options

    def finished_report(self) -> PrepareReport | None:
        """The report of a run with these settings that has finished, its outputs still there."""
        try:
            report = json.loads(self.report_path.read_text(encoding="utf-8"))
            sizes = [output.stat().st_size for output in self.outputs]
            if report["settings"] == self.settings and report["sizes"] == sizes:
                return PrepareReport(**{**report, "already_done": True})
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return None

    def check_outputs(self, overwrite: bool, resume: bool) -> None:
        """Raises FileExistsError where there is an output that must not be replaced."""
        # What is there beside the folder of a killed run may be its own; that run was let to write.
        if overwrite or (resume and read_settings(self.partial) == self.settings):
            return
        for path in self.outputs:
            if path.exists():
                raise FileExistsError(f"prepare: {path} exists; pass overwrite=True to replace it")

    def read(self, spool: Spool, report: ReadReport, bar: ProgressBar, workers: int | None) -> None:
        """Reads the sources to their end, or until there is enough."""
        if all(isinstance(item, Path) and item.is_file() for item in self.items):
            report.bytes_total = sum(item.stat().st_size for item in self.items if isinstance(item, Path))
        parser = self.options.parser
        workers = default_workers(self.items, parser) if workers is None else workers
        # Where reading may end early, it goes on record by record.
        shared = workers > 1 and self.options.limit is None and not self._wants_first
        if shared and can_share(self.items, parser):
            with Workers(workers, self.options, spool) as pool:
                for batch in pool.read(cut(self.items, self.options), report):
                    spool.add(batch)
                    bar.update()
                spool.complete(pool.keys_of_rows)
            return
        with seldom_collected():
            for batch in BatchReader(self.options).read_sources(self.items, report):
                spool.add(batch)
                bar.update()
                if len(batch) and self._wants_first and self._has_enough(spool):
                    return

    @property
    def _wants_first(self) -> bool:
        """Without shuffling, the first conversations are the wanted ones."""
        rules = self.rules
        return not rules.shuffle and (rules.max_conversations, rules.max_interactions) != (None, None)

    def _has_enough(self, spool: Spool) -> bool:
        """Whether the first conversations that are wanted are all read.

        Looks when the number of records is a power of two, so that merging them each time stays cheap.
        """
        if not len(spool) or len(spool) & (len(spool) - 1):
            return False
        kept = [count for count in spool.merge().kept if count]
        limits = (self.rules.max_conversations, self.rules.max_interactions)
        return any(limit is not None and found >= limit for limit, found in zip(limits, (len(kept), sum(kept))))

    def write(self, spool: Spool, report: ReadReport, order: array | None) -> PrepareReport:
        """Writes the outputs and the report from what was read."""
        result = PrepareReport(
            output=str(self.outputs[0]),
            eval_output=str(self.outputs[1]) if len(self.outputs) > 1 else None,
            left_out=dict(report.left_out),
            dropped=dict(report.dropped),
            records=report.records,
            formats=dict(report.formats),
            rating_followups=report.rating_followups,
            damaged=dict(report.damaged),
            problems=report.problems,
            lost_bytes=report.lost_bytes,
            settings=self.settings,
        )
        try:
            write_outputs(
                spool,
                self.outputs,
                self.rules,
                self.seed,
                self.settings["eval_fraction"],
                result,
                eval_after=self.eval_after,
                order=order,
            )
        except NothingKept:
            return result
        result.sizes = [path.stat().st_size for path in self.outputs]
        with atomic_file(self.report_path) as file:
            file.write(json.dumps(asdict(result), indent=2, ensure_ascii=False).encode() + b"\n")
        return result


def _time(name: str, value: str | float) -> float:
    try:
        return parse_time(value)
    except ValueError as error:
        raise ValueError(f"prepare: {name}: {error}") from None


def _with_folders(path: Path) -> list[Path]:
    path = path.resolve()
    return [path, *path.parents]


def _identity(item: Path | str) -> list:
    """What tells that a source is still the same when the command is given again."""
    if isinstance(item, str):
        return [item]
    status = item.stat()
    return [str(item.absolute()), status.st_size, status.st_mtime_ns]
