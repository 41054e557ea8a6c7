"""The package as a user gets it: its contents, its metadata, and that it works by itself."""

import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

DOCTESTS = """
import doctest, importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import implicitopt
assert implicitopt.__file__.startswith(sys.argv[1]), implicitopt.__file__
flags, attempted = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, 0
for found in pkgutil.walk_packages(implicitopt.__path__, "implicitopt."):
    # implicitopt.solve is the function: the module of that name is in sys.modules.
    importlib.import_module(found.name)
    failed, tried = doctest.testmod(sys.modules[found.name], optionflags=flags)
    assert not failed, found.name
    attempted += tried
print(attempted)
"""


def run(*command: object, folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel made from it, by this environment's hatchling."""
    for needed in ("build", "hatchling"):
        pytest.importorskip(needed)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={folder}", ROOT, folder=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (found,) = built.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"implicitopt", next(top for top in tops if top.endswith(".dist-info"))}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "implicitopt").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert {name for name in names if name.startswith("implicitopt/")} == sources


@pytest.mark.slow
def test_the_metadata_is_complete_and_torch_is_all_that_is_needed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = message_from_string(archive.read(name).decode())
    needed = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert needed == ["torch>=2.5"]
    for field in ("Summary", "License-Expression", "Author", "Keywords", "Requires-Python"):
        assert metadata[field], field
    assert metadata.get_payload().startswith("# implicitopt")


@pytest.mark.slow
def test_twine_finds_nothing_to_complain_about(built):
    pytest.importorskip("twine")
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), folder=built)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder outside of the checkout with the wheel's contents, as pip puts and compiles them."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--compile", "--target", target, wheel, folder=target)
    return target


@pytest.mark.slow
def test_the_installed_wheel_passes_its_doctests(installed):
    pytest.importorskip("matplotlib")  # which plot's example draws with
    attempted = run(sys.executable, "-I", "-c", DOCTESTS, installed, folder=installed)
    assert int(attempted.split()[-1]) > 100


@pytest.mark.slow
def test_importing_takes_less_than_a_tenth_of_a_second_beyond_torch(installed):
    """At best of five: a busy machine makes any one of them slow."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch, implicitopt"
    command = (sys.executable, "-I", "-X", "importtime", "-c", code, str(installed))
    seconds = []
    for _ in range(5):
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        (microseconds,) = re.findall(r"\| +(\d+) \| implicitopt$", told, re.MULTILINE)
        seconds.append(int(microseconds) / 1e6)
    assert min(seconds) < 0.1


def test_importing_needs_torch_and_the_standard_library_only():
    """numpy is there only if torch finds it; what the examples use must not creep in."""
    code = (
        "import sys, torch; before = set(sys.modules); import implicitopt; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    told = subprocess.run(
        (sys.executable, "-c", code), capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert set(told.split()) - set(sys.stdlib_module_names) <= {"implicitopt", "torch"}
