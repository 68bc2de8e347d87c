"""The wheel, built from this tree and used where the tree is not; what it declares; and what checks a change."""

import ast
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import import_module
from importlib.metadata import packages_distributions

import pytest
import yaml
from packaging.requirements import Requirement

from tests.ranks import ROOT
from train.wandb_file import NEWEST

toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings the second

PROJECT = toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
FLOORS = ("model", "parallel", "conf", "train", "launch", "deepnarrow")
OPTIONAL = {
    "launch/refine/": "refine",
    "launch/ray_nodes.py": "ray",
    "launch/dashboard.py": "dashboard",
    "model/": "gpu",
    "train/evaluate/": "eval",
}
"""Where something that only an extra installs is imported, and which."""
CONTENDERS = "launch/bench/"
"""Where what others train with is imported, to be measured beside this; whoever measures installs it."""
OF_A_CLONE = {f"launch/{name}" for name in ("gpu", "quickstart", "setup", "test")}
"""What makes an environment of a clone, which a wheel is not."""


def ran(*command, cwd, **more):
    """What a command prints; it must succeed, and finds nothing of this checkout by the path."""
    ended = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, **more)
    assert ended.returncode == 0, f"{command}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of this tree, tests and pages included: building writes into the tree it builds."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in (*FLOORS, "tests", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    ran(*pip, "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "dist", ".", cwd=copy)
    (made,) = (copy / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel in it: what it stands on is found beside it, and this checkout is not.

    A line of a .pth file is a folder to look in, whose own .pth files, of which one may lead to the checkout, are not
    read.
    """
    where = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(where, symlinks=True)
    (site,) = where.glob("lib/python*/site-packages")
    (site / "stands_on.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", where / "bin" / "python", "install"]
    ran(*pip, "--quiet", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=where)
    return where


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    def those(folder):
        return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}

    hidden = re.compile(r"(^|/)(\.|__pycache__/)")
    expected = {name for folder in FLOORS for name in those(folder) if not hidden.search(name)} - OF_A_CLONE
    info = f"deepnarrow-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(wheel) as opened:
        names = {name for name in opened.namelist() if not name.endswith("/")}
        assert {name for name in names if not name.startswith(f"{info}/")} == expected
        assert opened.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "deepnarrow = deepnarrow.__main__:main" in opened.read(f"{info}/entry_points.txt").decode()


def test_an_installed_wheel_says_its_version_describes_and_trains(environment, overrides, tmp_path):
    command, alone = environment / "bin" / "deepnarrow", {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    said = ran(command, "--version", cwd=tmp_path, env=alone).splitlines()
    assert said[:2] == [f"deepnarrow {PROJECT['version']}", "commit unknown"]
    assert ran(command, "describe", "tiny", cwd=tmp_path, env=alone).startswith("tiny: 8 layers")
    run, alone = tmp_path / "run", alone | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    ran(command, "train", *overrides, "train.max_steps=1", f"hydra.run.dir={run}", cwd=tmp_path, env=alone)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((run / "started.json").read_text())["code"] == PROJECT["version"]


def distribution_name(requirement):
    """The name in a requirement such as ``hydra-core>=1.3,<1.4``, as indexes compare names."""
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def imported():
    """Each package of others that the code imports, wherever in a file: (the file, the package)."""
    for path in (path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.partition(".")[0] for name in names} - {*FLOORS, *sys.stdlib_module_names}:
                yield str(path.relative_to(ROOT)), name


def test_every_package_that_is_imported_is_declared_and_every_one_declared_is_imported():
    """What others happen to bring goes when they do: an installation of the package alone then lacks it."""
    declared = {distribution_name(one) for one in PROJECT["dependencies"]}
    extras = {name: {distribution_name(one) for one in of} for name, of in PROJECT["optional-dependencies"].items()}
    known, used = packages_distributions(), set()
    for file, name in imported():
        distributions = {distribution_name(one) for one in known.get(name, [name])}
        used |= distributions
        if file.startswith(CONTENDERS):
            continue
        allowed = declared.union(*(extras[extra] for where, extra in OPTIONAL.items() if file.startswith(where)))
        assert distributions & allowed, f"{file} imports {name}, which pyproject.toml does not declare for it"
    assert declared - used == set()


def test_no_client_of_wandb_is_asked_for_whose_files_have_not_been_read():
    """A new version is let in by `NEWEST` and pyproject.toml at once, after the tests of W&B's files with it."""
    (asked,) = (one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "wandb")
    major, minor = map(int, NEWEST.split("."))
    assert f"{NEWEST}.99" in asked.specifier and f"{major}.{minor + 1}" not in asked.specifier


def test_what_keeps_a_commit_is_what_the_tests_begin_with():
    """The hooks of pre-commit and the linters of launch/test are the same commands, whose tools `dev` installs."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    assert repository["repo"] == "local"  # whatever else would be fetched
    hooks = [hook["entry"] for hook in repository["hooks"]]
    lines = [line.strip() for line in (ROOT / "launch" / "test").read_text("utf-8").splitlines()]
    begins = lines.index("unset PYTHONDONTWRITEBYTECODE")
    tools = ("ruff", "mypy", "lint-imports")
    assert sorted(hooks) == sorted(line for line in lines[begins:] if line.split(" ")[0] in tools)
    assert {hook.split()[0] for hook in hooks} == {*tools}


def test_a_commit_that_breaks_a_rule_is_refused(tmp_path):
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "__init__.py").write_text('"""A floor."""\nimport os\n')
    own = {"PATH": f"{sysconfig.get_path('scripts')}:/usr/bin:/bin", "HOME": str(tmp_path)}
    own |= {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
    own["SKIP"] = "import-contracts"  # of floors that are not there
    for command in (["git", "init", "--quiet"], ["git", "add", "."], ["pre-commit", "install"]):
        ran(*command, cwd=tmp_path, env=own)
    assert {path.name for path in (tmp_path / ".git" / "hooks").iterdir()} >= {"pre-commit", "pre-push"}
    commit = ["git", "commit", "--quiet", "--message", "a floor"]
    refused = subprocess.run(commit, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert refused.returncode and "F401" in refused.stderr and "1 file would be reformatted" in refused.stderr
    (tmp_path / "model" / "__init__.py").write_text('"""A floor."""\n')
    ran(*commit, "--all", cwd=tmp_path, env=own)


def test_versions_and_licence_agree():
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"version: {PROJECT['version']}\n" in cited and f"license: {PROJECT['license']}\n" in cited
    assert f"({PROJECT['version']})" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")[:200]
    assert [*PROJECT["requires-python"].split(">=")] == ["", "3.10"]
