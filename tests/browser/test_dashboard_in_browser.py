"""The page of a run in headless Chromium: what it draws, that nothing leaves it, and that the keyboard reaches it.

    make test-browser

Needs Chromium (on Debian: `apt-get install chromium`), so it is no part of `make test`.
"""

import http.server
import re
import shutil
import subprocess
import threading

import pytest
from run_fixture import build_run
from test_dashboard import HOSTILE, write_metrics

from freehold.run import dashboard

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]


def chromium(*arguments):
    assert CHROMIUM, "Chromium is not installed: apt-get install chromium"
    command = [CHROMIUM, *FLAGS, "--virtual-time-budget=3000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = build_run(tmp_path_factory.mktemp("browser") / "run")
    rows = [
        {"step": n, "phase": "stable", "loss/mean": 5 - n / 10, "moe/load/1": [n + 1, 2, 3, 4], HOSTILE: 1.0}
        for n in range(30)
    ]
    write_metrics(run, rows)
    dashboard.write(run, run / "dashboard.html")
    return run / "dashboard.html"


@pytest.fixture
def server(page):
    """Serve the page and note each path that is asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, directory=page.parent, **options)

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            return

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/dashboard.html", asked
    httpd.shutdown()


def test_page_is_drawn_and_asks_for_nothing_else(server):
    url, asked = server
    dom = chromium("--dump-dom", url).stdout
    assert len(re.findall(r"<polyline", dom)) >= 2
    assert len(re.findall(r'<img class="heat"', dom)) == 1
    assert "<script" not in dom
    assert HOSTILE not in dom
    assert set(asked) <= {"/dashboard.html", "/favicon.ico"}


def test_page_has_a_picture(page, tmp_path):
    picture = tmp_path / "page.png"
    chromium(f"--screenshot={picture}", page.as_uri())
    data = picture.read_bytes()
    assert data[:4] == b"\x89PNG"
    assert len(data) > 20_000, "more than a blank page"


def test_keyboard_reaches_charts_and_links(page):
    """Every chart can take the focus, and each section has a link: nothing needs a mouse."""
    dom = chromium("--dump-dom", page.as_uri()).stdout
    charts, focusable = len(re.findall(r"<svg ", dom)), len(re.findall(r'<svg [^>]*tabindex="0"', dom))
    assert charts == focusable > 0
    anchors = set(re.findall(r'<a href="#([a-z]+)"', dom))
    assert anchors == set(re.findall(r'<section id="([a-z]+)"', dom))
