"""Open the built site in Chromium and report what a reader would stumble over.

    mkdocs build --strict && python docs/check_site.py site --shots shots

Every page is opened at a desktop's and at a phone's width, in the light and in the dark scheme. The
site is served on loopback, below a path, as a project's pages often are. Reported are: errors in
the console, failed requests, requests to other hosts, links and anchors that lead nowhere, images
that do not load, formulas left as TeX, pages wider than the screen, text of too little contrast, a
search that does not find "Anderson", code that is not copied as it stands. Exits with 1 if there
is anything to report. Needs ``implicitopt[site]`` and a Chromium.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {"desktop": (1280, 900), "phone": (375, 812)}
BASE = "project"
#: W3C's least contrast of text is 4.5; code comments are held to less, as is large text.
CONTRAST = 3.0

# Of each text element that is visible: its contrast with the background behind it, where too low.
FAINT = """(least) => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
  };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const light = (color) => {
    const [r, g, b] = color.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = new Set();
  for (const element of document.querySelectorAll('article *, .md-nav *')) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest('.headerlink, .md-clipboard, .md-top')) continue;
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.unshift(getComputedStyle(e).backgroundColor);
    const back = layers.reduce((under, layer) => over(rgba(layer), under), [1, 1, 1]);
    const front = over(rgba(getComputedStyle(element).color), back);
    const [a, b] = [light(front), light(back)].sort((p, q) => q - p);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < least)
      found.add(`${element.textContent.trim().slice(0, 30)} (${contrast.toFixed(1)})`);
  }
  return [...found].slice(0, 5);
}"""

# Wider than the screen, though not scrolling by itself.
WIDE = """() => document.documentElement.scrollWidth > innerWidth + 1
  ? [...document.querySelectorAll('article *')]
      .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
      .map((e) => e.tagName.toLowerCase() + '.' + e.className).slice(0, 3).concat(['(page)'])
  : []"""

MATHS = """() => [...document.querySelectorAll('math')].filter((m) => {
  const box = m.getBoundingClientRect();
  return m.checkVisibility() && (box.width < 2 || box.height < 2);
}).length"""

TEX = """() => {
  const copy = (document.querySelector('article') || document.body).cloneNode(true);
  copy.querySelectorAll('code, pre, math').forEach((e) => e.remove());
  const tex = /\\$[^$]+\\$|\\\\\\(|\\\\\\[|\\\\(frac|mu|theta)\\b/g;
  return (copy.textContent.match(tex) || []).slice(0, 3);
}"""


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site, below a path, for as long as the context lasts."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, BASE).symlink_to(site.resolve())
        handler = functools.partial(Quiet, directory=folder)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}/{BASE}/"
            server.shutdown()


def check(site: Path, browser: str, shots: Path | None = None) -> list[str]:
    """What there is to report, a line each."""
    from playwright.sync_api import Error, sync_playwright

    pages = sorted(
        page.parent.relative_to(site).as_posix().removeprefix(".")
        for page in site.rglob("index.html")
    )
    problems: list[str] = []
    with served(site) as home, sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        look = _Look(site, home, problems, shots)
        for size in SIZES:
            for scheme in ("light", "dark"):
                context = chromium.new_context(
                    viewport=dict(zip(("width", "height"), SIZES[size], strict=True)),
                    color_scheme=scheme,
                )
                for page in pages:
                    look.at(context.new_page(), page, size, scheme)
                context.close()
        look.follow_links()
        context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
        for name, trial in (("search", look.search), ("copying", look.copy)):
            tab = context.new_page()
            tab.set_default_timeout(10_000)
            try:
                trial(tab)
            except Error as error:  # what is not there, or cannot be clicked
                problems.append(f"{name}: {error}")
        chromium.close()
    return problems


class _Look:
    def __init__(self, site: Path, home: str, problems: list[str], shots: Path | None) -> None:
        self.site, self.home, self.problems, self.shots = site, home, problems, shots
        self.ids: dict[str, set[str]] = {}
        self.links: set[tuple[str, str]] = set()

    def open(self, tab: Any, path: str, where: str) -> None:
        """Go to a page, noting what fails or leads elsewhere on the way."""

        def request(sent: Any) -> None:
            if urlsplit(sent.url).netloc not in ("", urlsplit(self.home).netloc):
                self.problems.append(f"{where}: asks for {sent.url}")

        def response(got: Any) -> None:
            if got.status >= 400:
                self.problems.append(f"{where}: {got.status} for {got.url}")

        def console(message: Any) -> None:
            if message.type in ("error", "warning"):
                self.problems.append(f"{where}: console {message.type}: {message.text}")

        tab.on("request", request)
        tab.on("response", response)
        tab.on("console", console)
        tab.on("pageerror", lambda error: self.problems.append(f"{where}: {error}"))
        tab.goto(self.home + (f"{path}/" if path else ""), wait_until="networkidle")

    def at(self, tab: Any, path: str, size: str, scheme: str) -> None:
        where = f"/{path} ({size}, {scheme})"
        self.open(tab, path, where)
        for name, found in {
            "wider than the screen": tab.evaluate(WIDE),
            "faint": tab.evaluate(FAINT, CONTRAST),
            "TeX left": tab.evaluate(TEX),
        }.items():
            if found:
                self.problems.append(f"{where}: {name}: {', '.join(found)}")
        if empty := tab.evaluate(MATHS):
            self.problems.append(f"{where}: {empty} formulas have no extent")
        broken = "() => [...document.images].filter((i) => !i.naturalWidth).map((i) => i.src)"
        self.problems += [f"{where}: image {src} does not load" for src in tab.evaluate(broken)]
        self.ids[tab.url] = set(
            tab.evaluate("() => [...document.querySelectorAll('[id]')].map((e) => e.id)")
        )
        hrefs = tab.evaluate("() => [...document.querySelectorAll('a[href]')].map((a) => a.href)")
        self.links |= {(where, href) for href in hrefs}
        if self.shots:
            name = f"{path.replace('/', '_') or 'home'}-{size}-{scheme}.png"
            tab.screenshot(path=self.shots / name, full_page=True)
        tab.close()

    def follow_links(self) -> None:
        """Links within the site lead to a page that was opened, or a file, and an id on it."""
        for where, href in sorted(self.links):
            if not href.startswith(self.home):
                continue
            target, anchor = urldefrag(href)
            if Path(self.site, unquote(target.removeprefix(self.home))).is_file():
                continue
            if target not in self.ids:
                self.problems.append(f"{where}: links to {target}, which is no page")
            elif anchor and unquote(anchor) not in self.ids[target]:
                self.problems.append(f"{where}: links to {href}, but there is no such place")

    def search(self, tab: Any, word: str = "Anderson") -> None:
        """The first result for a word shows it, and leads to a page that has it."""
        self.open(tab, "", "search")
        tab.fill("input[name=query]", word)
        found = tab.locator(".md-search-result__item").first
        shown = found.inner_text()
        found.locator("a").first.click()
        tab.wait_for_load_state("networkidle")
        if word not in shown or word not in tab.locator("article").inner_text():
            self.problems.append(f"search: {word!r} is not in the first result, {tab.url}")

    def copy(self, tab: Any) -> None:
        """The button beside the first Python block puts it on the clipboard, as it stands."""
        self.open(tab, "", "copying")
        block = tab.locator(".highlight", has_text="import implicitopt").first
        block.hover()
        block.locator("button[data-clipboard-target], button.md-code__button").first.click()
        tab.wait_for_timeout(200)
        copied = tab.evaluate("() => navigator.clipboard.readText()")
        if copied.strip() != block.locator("code").inner_text().strip():
            self.problems.append(f"copying: the clipboard holds {copied[:60]!r}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("site", type=Path, help="the folder that mkdocs wrote")
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--shots", type=Path, help="a folder for a screenshot of each page")
    options = parser.parse_args()
    if options.browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is on the PATH; name one with --browser")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    problems = check(options.site, options.browser, options.shots)
    print("\n".join(problems) or "Nothing to report.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
