"""The signal as one self-contained HTML page.

Everything in the page is in the file: no request leaves it, and its Content-Security-Policy allows
nothing but its own style sheet and script, each by its hash. Text from data is only ever text: it
is escaped here, and the script reads and writes text alone.
"""

from __future__ import annotations

import base64
import hashlib
import html

from fastsdpo.signal.compute import FollowupSignal, SignalResult
from fastsdpo.signal.palette import (
    LEVELS,
    THEMES,
    hex_color,
    level,
    signed,
    tint,
    tint_limit,
)
from fastsdpo.signal.tokens import visible

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1a1c1f; --quiet: #5b6168;
  --line: #d5d9de; --card: #f6f7f9; --focus: #6b2fb3; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 100rem; padding: 1.5rem 1.5rem 7rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
p { margin: .25rem 0; }
.quiet { color: var(--quiet); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: .75rem 1rem; margin: 0 0 .75rem; }
header, .role, #readout { overflow-wrap: anywhere; }
.role { font-size: .8rem; color: var(--quiet); margin: .5rem 0 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 1.5rem; margin: 1.25rem 0; }
.panel { min-width: 0; }
.answer { line-height: 2; background: var(--page); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem 1rem; }
dl { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .75rem 0; }
dl div { display: flex; gap: .5rem; }
dt { color: var(--quiet); }
dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem .75rem; margin: .75rem 0; }
.swatches { display: inline-flex; border: 1px solid var(--line); }
.swatches span { width: 1.1rem; height: 1.1rem; }
.t { position: relative; border-radius: .2rem; padding: .1rem 0; cursor: default;
  forced-color-adjust: none; print-color-adjust: exact; }
.t.special { font-family: ui-monospace, monospace; font-size: .8em; opacity: .85; }
.t.on { outline: 2px solid var(--quiet); }
.t:focus { outline: 3px solid var(--focus); }
.t:hover, .t:focus { z-index: 1; }
.t:hover::after, .t:focus::after { content: attr(data-value); position: absolute; left: 0;
  bottom: calc(100% + .15rem); padding: 0 .35rem; border-radius: .25rem; background: var(--ink);
  color: var(--page); font: 600 .8rem/1.5 system-ui, sans-serif; white-space: nowrap;
  direction: ltr; unicode-bidi: isolate; pointer-events: none; }
#readout { position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1.5rem;
  background: var(--card); border-top: 1px solid var(--line); min-height: 4.25rem;
  font-variant-numeric: tabular-nums; }
#readout b { font-weight: 600; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: .15rem .75rem; text-align: right; border-bottom: 1px solid var(--line); }
td.text, th.text { text-align: left; }
summary { cursor: pointer; }
"""

# Arrow keys, Home and End move through the answer, so that Tab passes it in one step. Hover and
# focus mark the same tokens under the other follow-up and write the numbers of both below.
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
  const show = (token) => {
    for (const other of shown) other.classList.remove("on");
    shown = groups.get(token.dataset.group);
    readout.replaceChildren(line(token.dataset.token, token.dataset.student));
    for (const other of shown) {
      other.classList.add("on");
      readout.append(line(other.dataset.title + ":", other.dataset.detail));
    }
  };
  const find = (event) => event.target.closest && event.target.closest(".t");
  document.addEventListener("mouseover", (event) => { const t = find(event); if (t) show(t); });
  document.addEventListener("focusin", (event) => { const t = find(event); if (t) show(t); });
  document.addEventListener("keydown", (event) => {
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


def render_html(result: SignalResult, *, limit: float | None = None) -> str:
    """The page as text; write it as UTF-8.

    Tokens are tinted by their log-ratio under the real and, side by side, the unrelated follow-up;
    values appear on hover and on keyboard focus, and in a table. Light or dark as the reader's
    system is.

    Args:
        limit: log-ratio in nats at which tints saturate; None: `tint_limit`.
    """
    if limit is None:
        limit = tint_limit(group.value(signal.log_ratio) for _, signal in result.followups for group in result.groups)
    style = STYLE + _tints()
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(SCRIPT)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    panels = "".join(
        _panel(result, title, signal, limit, number) for number, (title, signal) in enumerate(result.followups)
    )
    model = f"Model <b>{_text(result.model)}</b>. " if result.model else ""
    notes = "".join(f"<p>{_text(note)}</p>" for note in result.notes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>Token-level signal</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>Token-level signal</h1>
<p>How much more likely each token of the answer becomes when the model also sees what the user said
next: log p(token | prompt, follow-up) − log p(token | prompt), in nats.</p>
<p class="quiet">{model}{len(result.token_ids)} tokens after a context of {result.prompt_tokens}.
Hindsight template: <span class="text">{_text(result.template.strip())}</span></p>{notes}
</header>
{_conversation(result)}
{_legend(limit)}
<main class="panels">{panels}</main>
{_table(result)}
<div id="readout" role="status" aria-live="polite"><span class="quiet">Point at a token, or move to
the answer with Tab and through it with the arrow keys.</span></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    """Text from anywhere as HTML text or attribute value, nothing invisible in it."""
    return html.escape(visible(text, marks=False), quote=True)


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
        return (
            f'<p class="role">{_text(message["role"])}</p>'
            f'<div class="text" dir="auto">{_text(message["content"])}</div>'
        )

    *history, last = result.interaction.prompt
    earlier = ""
    if history:
        rows = "".join(map(show, history))
        plural = "s" if len(history) > 1 else ""
        earlier = f"<details><summary>{len(history)} earlier message{plural}</summary>{rows}</details>"
    return f'<section class="card"><h2>Prompt</h2>{earlier}{show(last)}</section>'


def _legend(limit: float) -> str:
    swatches = "".join(f'<span class="{_step_class(step)}"></span>' for step in range(-LEVELS, LEVELS + 1))
    return (
        f'<div class="legend"><span>−{limit:g} less likely</span>'
        f'<span class="swatches" aria-hidden="true">{swatches}</span>'
        f"<span>more likely +{limit:g}</span>"
        '<span class="quiet">nats; strongly negative tokens are underlined. ↵ newline, → tab, '
        "· space alone</span></div>"
    )


def _panel(result: SignalResult, title: str, signal: FollowupSignal, limit: float, number: int) -> str:
    tokens = "".join(_token(result, title, signal, limit, index) for index in range(len(result.groups)))
    names = {
        "mean": signed(signal.mean, 3),
        "sum": signed(signal.sum),
        "mean magnitude": f"{signal.mean_absolute:.3f}",
        "first token": signed(signal.first),
        "end of turn": signed(signal.end_of_turn),
    }
    stats = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in names.items())
    return (
        f'<section class="panel" aria-labelledby="panel{number}">'
        f'<h2 id="panel{number}">{title}</h2>'
        f'<div class="card text" dir="auto">{_text(signal.followup.strip())}</div>'
        f"<dl>{stats}</dl>"
        f'<div class="answer text" dir="auto" role="group" aria-describedby="readout" '
        f'aria-label="Answer, {title.lower()}">{tokens}</div></section>'
    )


def _token(result: SignalResult, title: str, signal: FollowupSignal, limit: float, index: int) -> str:
    group = result.groups[index]
    value = group.value(signal.log_ratio)
    student = group.value(result.student_logps)
    teacher = group.value(signal.teacher_logps)
    several = group.end - group.start > 1
    where = f"token {group.start}" + (f"–{group.end - 1}" if several else "")
    detail = f"{signed(value, 3)}, log p {signed(teacher, 3)}"
    if several:
        parts = " ".join(signed(v, 3) for v in signal.log_ratio[group.start : group.end])
        detail += f", sum of {parts}"
    kind = " special" if group.special else ""
    return (
        f'<span class="t {_step_class(level(value, limit))}{kind}" data-group="{index}" '
        f'tabindex="{0 if index == 0 else -1}" data-title="{title}" '
        f'data-value="{signed(value)}" data-detail="{detail}" '
        f'data-token="“{_attribute(group.text)}”" '
        f'data-student="{where}, log p without follow-up {signed(student, 3)}">'
        f"{html.escape(visible(group.text))}</span>"
    )


def _attribute(text: str) -> str:
    return html.escape(visible(text).replace("\n", ""), quote=True)


def _table(result: SignalResult) -> str:
    heads = "".join(f"<th>{title}: log p</th><th>log-ratio</th>" for title, _ in result.followups)
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
        "<details><summary>Values of every token</summary><div class='scroll'><table><thead><tr>"
        '<th>#</th><th class="text">token</th><th>id</th><th>log p without follow-up</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )
