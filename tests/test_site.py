"""The built site, opened in Chromium as a reader would."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.check_site import BROWSERS, check

ROOT = Path(__file__).resolve().parent.parent
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here"),
]


def write(folder: Path, name: str, body: str) -> None:
    page = folder / name / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"<!doctype html><title>{name}</title><article>{body}</article>")


def test_nothing_is_to_be_reported_of_the_site(tmp_path):
    for needed in ("playwright", "mkdocs", "math_core"):
        pytest.importorskip(needed)
    build = (sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet")
    subprocess.run((*build, f"--site-dir={tmp_path}"), check=True, cwd=ROOT)
    assert check(tmp_path, BROWSER) == []


def test_what_is_wrong_is_found(tmp_path):
    pytest.importorskip("playwright")
    write(
        tmp_path,
        "",
        '<a href="gone/">a</a> <a href="other/#nowhere">b</a> <img src="no.png"> $x^2$'
        '<div style="width: 3000px">wide</div> <p style="color: #fefefe">faint</p>'
        '<script src="http://127.0.0.2:9/x.js"></script><math></math>',
    )
    write(tmp_path, "other", "<p>here</p>")
    told = "\n".join(check(tmp_path, BROWSER))
    for symptom in (
        "links to http", "which is no page", "no such place", "no.png does not load", "TeX left",
        "wider than the screen", "faint (1.0)", "asks for http://127.0.0.2:9/x.js", "404 for",
        "formulas have no extent", "search:", "copying:",
    ):  # fmt: skip
        assert symptom in told, symptom
