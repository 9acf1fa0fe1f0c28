"""The HTML page: what is in the file, and what a real browser makes of it."""

import base64
import dataclasses
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess

import pytest

from fastsdpo.data import Interaction
from fastsdpo.signal import compute_signal, render_html
from fastsdpo.signal.palette import level, signed, tint
from fastsdpo.signal.tokens import visible
from fastsdpo.signal.words import times

ATTACK = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</style></span>\"'><svg onload=alert(1)>&lt;b&gt; http://example.com/ <!--"
)


@pytest.fixture(scope="module")
def attacked(model, tokenizer):
    """Everything that comes from outside holds markup."""
    roles = [(ATTACK, ATTACK), ("assistant", ATTACK), ("user", "What?" + ATTACK)]
    prompt = [{"role": role, "content": content} for role, content in roles]
    answer = "the answer " + ATTACK + "\n\n\tمرحبا 🎉 \u202e\n```\nx = 1\n```"
    interaction = Interaction(prompt, answer, "followup " + ATTACK, id=ATTACK)
    result = compute_signal(model, tokenizer, interaction, "</style>{o}<script>", unrelated="unrelated " + ATTACK)
    # What a tokenizer decodes is data too: tokens with markup in one piece.
    groups = [dataclasses.replace(result.groups[0], text=ATTACK), *result.groups[1:]]
    return dataclasses.replace(result, model=ATTACK, notes=[ATTACK], groups=groups)


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of style, script and title."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.inside, self._open = [], {}, None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        self.inside[self._open] = self.inside.get(self._open, "") + data

    def count(self, *names):
        return sum(tag in names for tag, _ in self.tags)


def digest(content):
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def test_page_holds_nothing_but_its_own_elements(attacked):
    page = render_html(attacked)
    elements = Elements(page)
    assert [elements.count(name) for name in ("script", "style", "link")] == [1, 1, 1]
    assert not elements.count("img", "svg", "iframe", "object", "form")
    for tag, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert {attributes.get(name, "data:,") for name in ("src", "href")} == {"data:,"}
    assert "\u202e" not in page and "⟨U+202E⟩" in page
    assert "url(" not in elements.inside["style"] and "@import" not in elements.inside["style"]


def test_policy_allows_this_style_and_this_script_only(attacked):
    elements = Elements(render_html(attacked))
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert dict(rule.strip().split(" ", 1) for rule in policy.split(";")) == {
        "default-src": "'none'",
        "style-src": digest(elements.inside["style"]),
        "script-src": digest(elements.inside["script"]),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_table_holds_every_number(attacked):
    rows = re.findall(r"<tr><td>.*?</tr>", render_html(attacked))
    assert len(rows) == len(attacked.token_ids)
    for row, student, real in zip(rows, attacked.student_logps, attacked.real.log_ratio):
        assert f"<td>{signed(student, 3)}</td>" in row and f"<td>{signed(real, 3)}</td>" in row


def test_one_panel_without_comparison(attacked):
    page = render_html(dataclasses.replace(attacked, unrelated=None))
    assert page.count('class="panel"') == 1 and "unrelated" not in page.lower()


# In a browser. What a reader does is done by a script of the test, which the page's policy is told of.

PROBE = """
const token = (panel, index) => document.querySelectorAll(".panel")[panel].querySelectorAll(".t")[index];
const shade = (panel, index) => getComputedStyle(token(panel, index)).backgroundColor;
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true,
  cancelable: true}));
const found = {title: document.title};
found.tints = [0, 1].map((panel) => [...Array(40).keys()].map((index) => shade(panel, index)));
found.page = getComputedStyle(document.body).backgroundColor;
const readout = document.getElementById("readout");
found.read = ["mouseover", "click"].map((event) => {
  token(1, 5).dispatchEvent(new MouseEvent(event, {bubbles: true}));
  const said = [readout.innerText, document.querySelectorAll(".t.on").length];
  document.body.click();
  return [...said, getComputedStyle(readout).display];
});
const fonts = (selector) => getComputedStyle(document.querySelector(selector)).fontFamily;
found.fonts = [fonts(".t"), fonts(".t.code")];
token(0, 0).focus();
found.focused = ["ArrowLeft", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"].map((key) => {
  press(key);
  return document.activeElement.dataset.group;
});
found.stops = document.querySelectorAll('.t[tabindex="0"]').length;
document.querySelectorAll("details").forEach((details) => { details.open = true; });
document.body.style.width = "360px";  // a phone's
found.width = document.body.scrollWidth;
document.title = JSON.stringify(found);
"""


def browse(url, profile, *options):
    """The page as Chromium leaves it, and what it says to its console."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium found: install it or name it in CHROMIUM")
    command = [program, "--headless", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}", "--dump-dom"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # as root Chromium starts no other way
    done = subprocess.run([*command, *options, url], capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_reader_in_a_browser(attacked, tmp_path, scheme):
    """Markup stays text, and nothing is asked for: the policy refuses any request, with a complaint."""
    page = render_html(attacked, limit=1.0)
    page = page.replace("script-src ", f"script-src {digest(PROBE)} ").replace("</body>", f"<script>{PROBE}</script>")
    (tmp_path / "signal.html").write_text(page, encoding="utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    left, complaints = browse((tmp_path / "signal.html").as_uri(), tmp_path / "profile", *dark)
    assert complaints == []
    elements = Elements(left)
    assert elements.count("script") == 2 and not elements.count("img", "svg")
    found = json.loads(elements.inside["title"])
    assert found["title"] == "What a reply tells the model about its answer"

    def color(step):
        return "rgb({}, {}, {})".format(*tint(step, scheme)[0])

    assert found["page"] == color(0)
    steps = [[level(g.value(s.log_ratio), 1.0) for g in attacked.groups[:40]] for _, s in attacked.followups]
    assert found["tints"] == [[color(step) if step else "rgba(0, 0, 0, 0)" for step in panel] for panel in steps]
    assert len(set(steps[0])) > 4 and min(steps[0]) < 0 < max(steps[0])
    assert found["width"] <= 360

    real, unrelated = (attacked.groups[5].value(signal.log_ratio) for _, signal in attacked.followups)
    text = " ".join(visible(attacked.groups[5].text).split())
    said = f"After the reply, “{text}”: {times(real)} ({signed(real)} nats)\n"
    said += f"After the unrelated one, “{text}”: {times(unrelated)} ({signed(unrelated)} nats)"
    assert [" ".join(read[0].split()) for read in found["read"]] == [" ".join(said.split())] * 2
    assert [read[1:] for read in found["read"]] == [[2, "none"]] * 2  # a tap elsewhere ends it
    assert found["fonts"][0].startswith("system-ui") and found["fonts"][1].startswith("ui-monospace")
    # Tab passes each answer in one step; the keys move through it and stop at its ends.
    assert found["focused"] == ["0", "1", "2", "1", str(len(attacked.groups) - 1), "0"]
    assert found["stops"] == 2
