"""Every Python block of the README and the docs runs as written.

A file's blocks run in order in one namespace, so a later block may use what an earlier one
defined. A fence that says ``notest`` after ``python`` is left out.
"""

import doctest
import importlib
import inspect
import re
from enum import IntEnum
from pathlib import Path

import matplotlib
import pytest
import torch

import implicitopt

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python(?P<options>[^\n]*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def python_blocks(text: str) -> list[str]:
    """The blocks to run, each after as many empty lines as stand above it in the text."""
    return [
        "\n" * text.count("\n", 0, match.start("code")) + match["code"]
        for match in FENCE.finditer(text)
        if "notest" not in match["options"]
    ]


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
    if python_blocks(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    with torch.random.fork_rng(devices=[]):
        for block in python_blocks(page.read_text(encoding="utf-8")):
            # The empty lines in front make a traceback name the page's own line.
            exec(compile(block, str(page), "exec"), namespace)


def test_a_block_keeps_its_line_number_and_notest_is_left_out():
    text = "# title\n\n```python\nx = 1\n```\n\n```python notest\nx = 2\n```\n\n```text\nx\n```\n"
    assert python_blocks(text) == ["\n\n\nx = 1\n"]


def test_the_readme_has_an_example():
    assert ROOT / "README.md" in PAGES


def test_api_page_lists_every_public_name():
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text("utf-8"), re.MULTILINE)
    names = [target.rpartition(".")[2] for target in listed]
    assert len(names) == len(set(names))
    assert set(implicitopt.__all__) <= set(names)
    for target in listed:  # each is where the page says it is
        module, _, name = target.rpartition(".")
        assert hasattr(importlib.import_module(module), name), target
        if name in implicitopt.__all__:
            assert getattr(importlib.import_module(module), name) is getattr(implicitopt, name)


@pytest.mark.parametrize("name", implicitopt.__all__)
def test_every_public_name_has_an_example_that_stands_alone(name):
    """Copied from the API page, without the module's own imports, it runs."""
    public = getattr(implicitopt, name)
    # A dataclass without a docstring of its own has its signature for one: no example in that.
    example = doctest.DocTestParser().get_doctest(public.__doc__, {}, name, None, None)
    assert example.examples, f"{name} has no example"
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    with torch.random.fork_rng(devices=[]):
        failed, _ = doctest.DocTestRunner(optionflags=flags).run(example)
    assert not failed


CALLED = [  # Status(1) and errors are not made by users
    name
    for name in implicitopt.__all__
    if not (
        isinstance(public := getattr(implicitopt, name), type)
        and issubclass(public, BaseException | IntEnum)
    )
]


@pytest.mark.parametrize("name", CALLED)
def test_every_argument_of_a_public_name_is_documented(name):
    """Under Args, or by a comment beside the field."""
    public = getattr(implicitopt, name)
    source = inspect.getsource(public)
    for argument in inspect.signature(public).parameters:
        listed = re.search(rf"^\s+(\w+, )*{argument}(, \w+)*: ", public.__doc__, re.MULTILINE)
        beside = re.search(rf"^\s+{argument}: .*#: ", source, re.MULTILINE)
        assert listed or beside, f"{name} does not say what {argument} is"
