"""The HTML page: what is in the file, and what a real browser makes of it."""

import base64
import contextlib
import dataclasses
import fcntl
import hashlib
import html.parser
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from fastsdpo.data import Interaction
from fastsdpo.signal import compute_signal, render_html
from fastsdpo.signal.palette import LEVELS, hex_color, signed, tint

ATTACK = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "</style></span>\"'><svg onload=alert(1)>&lt;b&gt; http://example.com/ <!--"
)


@pytest.fixture(scope="module")
def attacked(model, tokenizer):
    """Everything that comes from outside holds markup."""
    interaction = Interaction(
        [
            {"role": ATTACK, "content": ATTACK},
            {"role": "assistant", "content": ATTACK},
            {"role": "user", "content": "What?" + ATTACK},
        ],
        "the answer " + ATTACK + "\n\n\tمرحبا 🎉 \u202e",
        "followup " + ATTACK,
        id=ATTACK,
    )
    result = compute_signal(model, tokenizer, interaction, "</style>{o}<script>", unrelated="unrelated " + ATTACK)
    # What a tokenizer decodes is data too: tokens with markup in one piece.
    groups = [dataclasses.replace(result.groups[0], text=ATTACK), *result.groups[1:]]
    return dataclasses.replace(result, model=ATTACK, notes=[ATTACK], groups=groups)


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, and the text of style and script."""

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
        if self._open in ("style", "script"):
            self.inside[self._open] = self.inside.get(self._open, "") + data


def test_page_holds_nothing_but_its_own_elements(attacked):
    page = render_html(attacked)
    elements = Elements(page)
    count = {tag: sum(t == tag for t, _ in elements.tags) for tag in ("script", "style", "link")}
    assert count == {"script": 1, "style": 1, "link": 1}
    assert not {"img", "svg", "iframe", "object", "form"} & {t for t, _ in elements.tags}
    for tag, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            assert attributes.get(name, "data:,") == "data:,"
    assert "\u202e" not in page and "⟨U+202E⟩" in page
    assert "url(" not in elements.inside["style"] and "@import" not in elements.inside["style"]


def test_policy_allows_this_style_and_this_script_only(attacked):
    elements = Elements(render_html(attacked))
    (policy,) = [a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]

    def digest(kind):
        raw = hashlib.sha256(elements.inside[kind].encode()).digest()
        return f"'sha256-{base64.b64encode(raw).decode()}'"

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": digest("style"),
        "script-src": digest("script"),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_table_holds_every_number(attacked):
    page = render_html(attacked)
    rows = re.findall(r"<tr><td>.*?</tr>", page)
    assert len(rows) == len(attacked.token_ids)
    for row, student, real in zip(rows, attacked.student_logps, attacked.real.log_ratio):
        assert f"<td>{signed(student, 3)}</td>" in row and f"<td>{signed(real, 3)}</td>" in row


def test_one_panel_without_comparison(attacked):
    page = render_html(dataclasses.replace(attacked, unrelated=None))
    assert page.count('class="panel"') == 1 and "Unrelated follow-up" not in page


# In a browser


def find_chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    given = os.environ.get("CHROMIUM")
    if given:
        return shutil.which(given) or pytest.fail(f"CHROMIUM={given} is no program")
    return next(filter(None, map(shutil.which, names)), None)


# The protocol's pipe is on descriptors 3 and 4.
LAUNCH = "import os, sys; os.dup2({}, 3); os.dup2({}, 4); os.execvp(sys.argv[1], sys.argv[1:])"


class Browser:
    """Headless Chromium, spoken to over the pipe of its DevTools protocol."""

    def __init__(self, program, profile):
        raw = [*os.pipe(), *os.pipe()]
        pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in raw]
        for end in raw:
            os.close(end)
        theirs_read, self.write, self.read, theirs_write = pipes
        command = [
            program,
            "--headless",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "--window-size=1100,900",
            "--remote-debugging-pipe",
            "about:blank",
        ]
        if os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # as root Chromium starts no other way
        launch = LAUNCH.format(theirs_read, theirs_write)
        self.process = subprocess.Popen(
            [sys.executable, "-c", launch, *command],
            pass_fds=(theirs_read, theirs_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []

    def attach(self):
        targets = self.send("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.send(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.buffer:
            data = os.read(self.read, 1 << 16)
            if not data:
                raise ConnectionError("the browser has ended")
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def send(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (reply := self.receive()).get("id") != self.number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def evaluate(self, expression):
        reply = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self.receive())

    def key(self, name):
        codes = {"Tab": 9, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=name,
                code=name,
                windowsVirtualKeyCode=codes[name],
            )

    def urls(self):
        """Everything that was requested since the page was opened."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]

    def complaints(self):
        return [
            event["params"]
            for event in self.events
            if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
        ]

    def close(self):
        with contextlib.suppress(Exception):
            self.session = None
            self.send("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def browser():
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium found: install it or name it in CHROMIUM")
    # Not under pytest's folder: the browser may still write into its profile when it ends.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        running = Browser(program, profile)
        try:
            running.attach()
            yield running
        finally:
            running.close()


@pytest.fixture
def opened(browser, attacked, tmp_path):
    path = tmp_path / "signal.html"
    path.write_text(render_html(attacked, limit=1.0), encoding="utf-8")
    browser.send("Emulation.setEmulatedMedia", features=[])
    browser.open(path.as_uri())
    return browser


def token(panel, index):
    return f"document.querySelectorAll('.panel')[{panel}].querySelectorAll('.t')[{index}]"


def background(panel, index):
    return f"getComputedStyle({token(panel, index)}).backgroundColor"


def test_browser_shows_markup_as_text(opened, attacked):
    assert opened.evaluate("document.title") == "Token-level signal"
    assert opened.evaluate("document.scripts.length") == 1
    assert opened.evaluate("document.images.length + document.querySelectorAll('svg').length") == 0
    assert opened.evaluate(token(0, 0) + ".textContent") == ATTACK
    assert ATTACK in opened.evaluate("document.querySelector('.panel .card').textContent")
    # Every field that comes from outside is on the page, as text: a role and three messages,
    # two follow-ups, model, note, and a token under both follow-ups and in the table.
    page = "document.body.cloneNode(true)"
    text = f"(() => {{ const b = {page}; b.querySelector('script').remove(); return b.textContent }})()"
    assert opened.evaluate(text).count(ATTACK) == 4 + 2 + 2 + 3
    assert "</style>{o}<script>" in opened.evaluate(text)
    assert opened.complaints() == []


def test_browser_requests_nothing(browser, attacked):
    """Served over HTTP, where a favicon or any relative address would show as a request."""
    asked = []
    page = render_html(attacked).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/signal.html"
        browser.open(url)
        time.sleep(0.3)
        browser.evaluate("1")  # collects the events of that time
        server.shutdown()
    assert asked == ["/signal.html"]
    assert [u for u in browser.urls() if not u.startswith("data:")] == [url]
    assert browser.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_tints_tokens(opened, attacked, scheme):
    opened.send(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    seen = set()
    for panel, (_, signal) in enumerate(attacked.followups):
        for index, group in enumerate(attacked.groups):
            step = max(-LEVELS, min(LEVELS, round(group.value(signal.log_ratio) * LEVELS)))
            red, green, blue = tint(step, scheme)[0]
            expected = f"rgb({red}, {green}, {blue})" if step else "rgba(0, 0, 0, 0)"
            if index < 40:
                assert opened.evaluate(background(panel, index)) == expected
            seen.add(step)
    assert len(seen) > 4 and min(seen) < 0 < max(seen)
    page = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    numbers = tuple(map(int, re.findall(r"\d+", page)))
    assert hex_color(numbers[:3]) == hex_color(tint(0, scheme)[0])


def test_browser_shows_values_on_hover(opened, attacked):
    index = 5
    box = opened.evaluate(
        f"(() => {{ const t = {token(1, index)}; t.scrollIntoView({{block: 'center'}});"
        " const r = t.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    tip = f"getComputedStyle({token(1, index)}, '::after').content"
    assert opened.evaluate(tip) == "none"
    opened.send("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
    group = attacked.groups[index]
    real, unrelated = (group.value(s.log_ratio) for _, s in attacked.followups)
    assert opened.evaluate(tip) == f'"{signed(unrelated)}"'
    readout = opened.evaluate("document.getElementById('readout').textContent")
    assert f"Real follow-up: {signed(real, 3)}" in readout
    assert f"Unrelated follow-up: {signed(unrelated, 3)}" in readout
    assert signed(group.value(attacked.student_logps), 3) in readout
    assert opened.evaluate("document.querySelectorAll('.t.on').length") == 2


def test_browser_moves_by_keyboard(opened, attacked):
    focused = "document.activeElement.dataset.group"
    opened.evaluate("document.activeElement.blur()")
    for _ in range(4):  # over the folded messages
        opened.key("Tab")
        if opened.evaluate(focused) is not None:
            break
    assert opened.evaluate(focused) == "0"
    opened.key("ArrowRight")
    opened.key("ArrowRight")
    opened.key("ArrowLeft")
    assert opened.evaluate(focused) == "1"
    value = signed(attacked.groups[1].value(attacked.real.log_ratio))
    assert opened.evaluate("getComputedStyle(document.activeElement, '::after').content") == (f'"{value}"')
    opened.key("End")
    assert opened.evaluate(focused) == str(len(attacked.groups) - 1)
    assert "end" in opened.evaluate("document.getElementById('readout').textContent")
    opened.key("Tab")  # one step to the other answer
    assert opened.evaluate(focused) == "0"
    assert opened.evaluate("document.activeElement.dataset.title") == "Unrelated follow-up"
    opened.key("ArrowLeft")  # already at the start
    assert opened.evaluate(focused) == "0"


def test_browser_page_fits_a_phone(opened):
    opened.send(
        "Emulation.setDeviceMetricsOverride",
        width=360,
        height=640,
        deviceScaleFactor=1,
        mobile=False,
    )
    try:
        wide = opened.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{wide} pixels too wide"
    finally:
        opened.send("Emulation.clearDeviceMetricsOverride")
