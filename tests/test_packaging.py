"""The package: its three lists of requirements agree, its lists of modules are whole, and it installs."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
COMMANDS = sorted(PROJECT["scripts"])


def ranges_of(lines):
    """{name: range} of requirements; a name that comes twice must have one range."""
    ranges = {}
    for line in lines:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert ranges.setdefault(name, requirement.specifier) == requirement.specifier, f"{name} has two ranges"
        assert requirement == Requirement(f"{requirement.name}{requirement.specifier}"), f"{line}: more than a range"
    return ranges


def required():
    """requirements.txt as {name: range}."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = [canonicalize_name(Requirement(line).name) for line in lines if line]
    assert len(names) == len(set(names)), "requirements.txt names a package twice"
    return ranges_of(line for line in lines if line)


def test_pyproject_and_requirements_agree():
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    assert ranges_of(PROJECT["dependencies"] + extras) == required()


def test_the_pins_lie_in_the_ranges():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    lines = re.findall(r"^    - ([\w.-]+)==(\S+)$", text, re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines}
    assert len(pins) == len(lines) == len(re.findall("^    - ", text, re.MULTILINE))      # every line is one pin
    assert [name for name, _ in lines] == sorted((name for name, _ in lines), key=str.lower)
    wrong = {name: (pins.get(name), str(range)) for name, range in required().items()
             if name not in pins or not range.contains(pins[name], prereleases=True)}
    assert not wrong
    python = re.search(r"^  - python=(\S+)$", text, re.MULTILINE)[1]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    build, = PYPROJECT["build-system"]["requires"]
    assert Requirement(build).specifier.contains(pins["setuptools"])      # the tests below build with this one


def test_every_module_and_package_is_listed():
    """setuptools leaves out without a word what is not listed."""
    listed = PYPROJECT["tool"]["setuptools"]
    assert sorted(listed["py-modules"]) == sorted(path.stem for path in ROOT.glob("*.py"))
    packages = [".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "LoTA").rglob("__init__.py")]
    assert sorted(listed["packages"]) == sorted(packages)


def copy_source(folder):
    """Copies the repository's files without those that git ignores, because a build writes into its source."""
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the files of the source, and this is no git checkout")
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():             # git lists a deleted file until the deletion is committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(*command, cwd):
    """Runs a command that sees nothing of this checkout, and returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("editable", [False, True], ids=["installed", "editable"])
def test_an_installation_has_the_commands(tmp_path, editable):
    """A new environment sees this one's libraries through a .pth file, and gets the project alone."""
    source = copy_source(tmp_path / "source")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    venv.create(tmp_path / "env", symlinks=True)
    paths = sysconfig.get_paths("venv", vars=dict.fromkeys(("base", "platbase"), str(tmp_path / "env")))
    programs = Path(paths["scripts"])
    visible = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (Path(paths["purelib"]) / "libraries.pth").write_text("\n".join(visible) + "\n")

    # --ignore-installed: without it pip would look for an older installation in the environment that runs the tests
    run(programs / "python", "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index",
        "--ignore-installed", "--disable-pip-version-check", *(["-e"] if editable else []), source, cwd=elsewhere)
    if not editable:
        shutil.rmtree(source)                   # an installation does not need it
    assert set(COMMANDS) <= {path.name for path in programs.iterdir()}
    home = tmp_path / ("source" if editable else "env")
    for module in ("LoTA.export", *PYPROJECT["tool"]["setuptools"]["py-modules"]):
        found = run(programs / "python", "-c", f"import importlib.util as u; print(u.find_spec({module!r}).origin)",
                    cwd=elsewhere)
        assert Path(found.strip()).is_relative_to(home), f"{module} comes from an older installation: {found}"
    for command in COMMANDS:
        printed = run(programs / command, "--help", cwd=elsewhere)
        assert "usage:" in printed and ("--mode" in printed or command != "lota-qaf")
