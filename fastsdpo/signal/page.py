"""Renders the signal as one self-contained HTML page.

Everything in the page is in the file: no request leaves it, and its Content-Security-Policy allows
nothing but its own style sheet and script, each by its hash. Text from data is only ever text: it
is escaped here, and the script reads and writes text alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re

from fastsdpo.signal.compute import FollowupSignal, SignalResult
from fastsdpo.signal.palette import LEVELS, SCALE, THEMES, hex_color, level, signed, tint
from fastsdpo.signal.tokens import visible
from fastsdpo.signal.words import LESS, MORE, TRAINING, comparison, times, verdict

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1c1f; --quiet: #5b6168;
  --line: #d5d9de; --card: #f6f7f9; --focus: #6b2fb3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.5rem 6rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; }
h3 { font-size: .95rem; margin: .9rem 0 .35rem; }
p { margin: .25rem 0; }
.verdict { font-size: 1.1rem; max-width: 60rem; }
.quiet { color: var(--quiet); }
.text { white-space: pre-wrap; unicode-bidi: plaintext; }
code, .t.code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .9rem; margin: 0; }
.role { font-size: .8rem; color: var(--quiet); margin: .5rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem; margin: 1.25rem 0; }
.panel { min-width: 0; }
.answer { line-height: 1.9; background: var(--page); border: 1px solid var(--line);
  border-radius: .5rem; padding: .6rem .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .5rem 0; }
dl div { display: flex; gap: .5rem; }
dt { color: var(--quiet); }
dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.legend { display: grid; grid-template-columns: auto 1fr; gap: .3rem .75rem; margin: 1rem 0; }
.swatches { display: inline-flex; align-self: center; border: 1px solid var(--line); }
.swatches span { width: 1.1rem; height: 1.1rem; }
.t { position: relative; border-radius: .2rem; padding: .1rem 0; cursor: default;
  forced-color-adjust: none; print-color-adjust: exact; }
.t.special { font-family: ui-monospace, monospace; font-size: .8em; opacity: .85; }
.t.on { outline: 2px solid var(--quiet); }
.t:focus { outline: 3px solid var(--focus); }
.t:hover, .t:focus { z-index: 1; }
#readout { position: fixed; left: 0; right: 0; bottom: 0; padding: .5rem 1.5rem;
  background: var(--card); border-top: 1px solid var(--line); font-size: .95rem; line-height: 1.4;
  max-height: 30vh; overflow-y: auto; font-variant-numeric: tabular-nums; }
#readout:empty { display: none; }
#readout b { font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
th, td { padding: .15rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
td.text, th.text { text-align: left; white-space: pre; }
summary { cursor: pointer; padding: .25rem 0; }
@media (max-width: 40rem) {
  body { padding: 1rem 1rem 6rem; }
  #readout { padding: .4rem 1rem; font-size: .85rem; }
}
"""

# Arrow keys, Home and End move through the answer, so that Tab passes it in one step. Hover, focus and
# a tap mark the same token under the other reply and say what it means below; a tap elsewhere ends that.
SCRIPT = """
(() => {
  const readout = document.getElementById("readout");
  const groups = new Map();
  for (const token of document.querySelectorAll(".t")) {
    const same = groups.get(token.dataset.group) || [];
    same.push(token);
    groups.set(token.dataset.group, same);
  }
  const line = (bold, text) => {
    const row = document.createElement("div");
    const name = document.createElement("b");
    name.textContent = bold;
    row.append(name, " " + text);
    return row;
  };
  let shown = [];
  const hide = () => {
    for (const other of shown) other.classList.remove("on");
    shown = [];
    readout.replaceChildren();
  };
  const show = (token) => {
    hide();
    shown = groups.get(token.dataset.group);
    for (const other of shown) {
      other.classList.add("on");
      readout.append(line(other.dataset.title + " " + token.dataset.token, other.dataset.detail));
    }
  };
  const find = (event) => event.target.closest && event.target.closest(".t");
  document.addEventListener("mouseover", (event) => { const t = find(event); if (t) show(t); });
  document.addEventListener("focusin", (event) => { const t = find(event); if (t) show(t); });
  document.addEventListener("click", (event) => {
    const token = find(event);
    if (token) show(token);
    else if (!readout.contains(event.target)) hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const token = find(event);
    if (!token || event.ctrlKey || event.altKey || event.metaKey) return;
    const row = [...token.parentElement.querySelectorAll(".t")];
    const rtl = getComputedStyle(token.parentElement).direction === "rtl" ? -1 : 1;
    const at = row.indexOf(token);
    const to = { ArrowRight: at + rtl, ArrowLeft: at - rtl, Home: 0, End: row.length - 1 }[event.key];
    if (to === undefined || !row[to]) return;
    event.preventDefault();
    token.tabIndex = -1;
    row[to].tabIndex = 0;
    row[to].focus();
  });
})();
"""

TITLE = "What a reply tells the model about its answer"
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
PANELS = (
    ("The model's answer, tinted by the reply", "The user's reply", "After the reply,"),
    ("For comparison: tinted by an unrelated reply", "An unrelated reply", "After the unrelated one,"),
)


def render_html(result: SignalResult, *, limit: float | None = None) -> str:
    """Returns the page as text, to be written as UTF-8.

    The page shows prompt, answer and follow-up in the order of the conversation, with the answer's tokens tinted
    by their log-ratio, and beside it the same answer tinted by the unrelated follow-up. Hover, tap and keyboard
    focus say what a token's tint means; a table has all numbers. The page is light or dark as the reader's
    system is.

    Args:
        limit: log-ratio in nats at which tints saturate; None: `SCALE`, so that pages compare.
    """
    limit = SCALE if limit is None else limit
    style = STYLE + _tints()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(SCRIPT)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    panels = "".join(_panel(result, signal, limit, number) for number, (_, signal) in enumerate(result.followups))
    notes = "".join(f"<p>{_text(note)}</p>" for note in result.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{TITLE}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{TITLE}</h1>
<p class="verdict">{_text(verdict(result))}</p>{notes}
</header>
{_legend(limit)}
<main>
{_conversation(result)}
<div class="panels">{panels}</div>
</main>
{_numbers(result)}
<div id="readout" role="status" aria-live="polite"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    """Text from anywhere as HTML text or attribute value, nothing invisible in it."""
    return html.escape(visible(text, marks=False), quote=True)


def _message(text: str) -> str:
    """A message as HTML, with its code in a fixed font."""
    pieces, end = [], 0
    for match in CODE.finditer(text):
        pieces += [_text(text[end : match.start()]), f"<code>{_text(match.group())}</code>"]
        end = match.end()
    return "".join([*pieces, _text(text[end:])])


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _step_class(step: int) -> str:
    return f"p{step}" if step > 0 else f"n{-step}" if step < 0 else "z"


def _tints() -> str:
    """A class per step, in light and dark, and the dark theme's own colours."""

    def rules(theme: str) -> str:
        lines = []
        for step in range(-LEVELS, LEVELS + 1):
            if step:
                background, text = (hex_color(color) for color in tint(step, theme))
                lines.append(f".{_step_class(step)} {{ background: {background}; color: {text}; }}")
        return "\n".join(lines)

    page, ink = (hex_color(color) for color in THEMES["dark"][:2])
    dark = (
        f":root {{ --page: {page}; --ink: {ink}; --quiet: #a2a9b3; --line: #3a3f47; "
        "--card: #1f2329; --focus: #c9a2ff; }"
    )
    # Direction without colour: strongly negative tokens are underlined with dots.
    negative = ", ".join(f".t.n{step}" for step in range(LEVELS // 2, LEVELS + 1))
    underline = f"{negative} {{ text-decoration: underline dotted; text-underline-offset: .2em; }}"
    return f"{rules('light')}\n{underline}\n@media (prefers-color-scheme: dark) {{\n{dark}\n{rules('dark')}\n}}\n"


def _conversation(result: SignalResult) -> str:
    def show(message: dict) -> str:
        return f'<div class="card text" dir="auto">{_message(message["content"])}</div>'

    *history, last = result.interaction.prompt
    earlier = ""
    if history:
        rows = "".join(f'<p class="role">{_text(message["role"])}</p>{show(message)}' for message in history)
        plural = "s" if len(history) > 1 else ""
        earlier = f"<details><summary>{len(history)} earlier message{plural}</summary>{rows}</details>"
    return f"<section><h2>The user's prompt</h2>{earlier}{show(last)}</section>"


def _legend(limit: float) -> str:
    def swatches(sign: int) -> str:
        steps = "".join(f'<span class="{_step_class(sign * step)}"></span>' for step in range(2, LEVELS + 1, 2))
        return f'<span class="swatches" aria-hidden="true">{steps}</span>'

    blue, orange = (text.replace(":", "</b>:", 1).capitalize() for text in (MORE, LESS))
    full = times(limit).removesuffix(" more likely")
    return (
        f'<div class="legend">{swatches(1)}<span><b>{blue}.</span>'
        f"{swatches(-1)}<span><b>{orange}.</span>"
        f'<span></span><span class="quiet">{TRAINING} Full colour: {full} or more. Point at a word or tap it '
        "to see its change.</span></div>"
    )


def _panel(result: SignalResult, signal: FollowupSignal, limit: float, number: int) -> str:
    title, reply, _ = PANELS[number]
    code = _code_groups(result)
    note = f'<p class="quiet">{comparison(result)}</p>'
    tokens = "".join(
        _token(result, signal, limit, index, number, index in code) for index in range(len(result.groups))
    )
    return (
        f'<section class="panel" aria-labelledby="panel{number}">'
        f'<h2 id="panel{number}">{title}</h2>'
        f'<div class="answer text" dir="auto" role="group" aria-describedby="readout" '
        f'aria-labelledby="panel{number}">{tokens}</div>'
        f"{note if number else ''}<h3>{reply}</h3>"
        f'<div class="card text" dir="auto">{_message(signal.followup.strip())}</div></section>'
    )


def _code_groups(result: SignalResult) -> set[int]:
    """The groups of tokens that are part of code in the answer."""
    text = "".join(group.text for group in result.groups)
    spans = [match.span() for match in CODE.finditer(text)]
    found, start = set(), 0
    for index, group in enumerate(result.groups):
        end = start + len(group.text)
        if any(start < stop and begin < end for begin, stop in spans):
            found.add(index)
        start = end
    return found


def _token(result: SignalResult, signal: FollowupSignal, limit: float, index: int, number: int, code: bool) -> str:
    group = result.groups[index]
    value = group.value(signal.log_ratio)
    kind = (" special" if group.special else "") + (" code" if code else "")
    return (
        f'<span class="t {_step_class(level(value, limit))}{kind}" data-group="{index}" '
        f'tabindex="{0 if index == 0 else -1}" data-title="{PANELS[number][2]}" '
        f'data-detail="{times(value)} ({signed(value)} nats)" '
        f'data-token="“{_attribute(group.text)}”:">'
        f"{html.escape(visible(group.text))}</span>"
    )


def _attribute(text: str) -> str:
    return html.escape(visible(text).replace("\n", ""), quote=True)


def _numbers(result: SignalResult) -> str:
    """What a reader of the paper looks for: settings, summaries, and a table of all tokens."""
    model = f"Model <b>{_text(result.model)}</b>. " if result.model else ""
    rows = []
    for title, signal in result.followups:
        names = {
            "mean": signed(signal.mean, 3),
            "sum": signed(signal.sum),
            "mean magnitude": f"{signal.mean_absolute:.3f}",
            "first token": signed(signal.first),
            "end of turn": signed(signal.end_of_turn),
        }
        stats = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in names.items())
        rows.append(f"<h3>{title}, in nats</h3><dl>{stats}</dl>")
    return (
        "<details><summary>Numbers</summary><p>A token's number is log p(token | prompt, reply) − log p(token | "
        f"prompt), in nats. {model}{len(result.token_ids)} tokens after a context of {result.prompt_tokens}. "
        f'The reply enters the context as <span class="text">{_text(result.template.strip())}</span></p>'
        f"{''.join(rows)}{_table(result)}</details>"
    )


def _table(result: SignalResult) -> str:
    heads = "".join(f"<th>{title}: log p</th><th>change</th>" for title, _ in result.followups)
    rows = []
    for group in result.groups:
        for t in range(group.start, group.end):
            text = _attribute(group.text)
            part = f" ({t - group.start + 1}/{group.end - group.start})"
            numbers = "".join(
                f"<td>{signed(signal.teacher_logps[t], 3)}</td><td>{signed(signal.log_ratio[t], 3)}</td>"
                for _, signal in result.followups
            )
            rows.append(
                f'<tr><td>{t}</td><td class="text">{text}'
                f"{part if group.end - group.start > 1 else ''}</td><td>{result.token_ids[t]}</td>"
                f"<td>{signed(result.student_logps[t], 3)}</td>{numbers}</tr>"
            )
    return (
        "<h3>Every token</h3><div class='scroll'><table><thead><tr>"
        '<th>#</th><th class="text">token</th><th>id</th><th>log p without reply</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
