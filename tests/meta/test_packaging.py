"""What is published: the sdist holds what its tests read, the wheel is typed, the files around them parse and agree."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOME, VERSION = PROJECT["urls"]["Repository"], PROJECT["version"]
# Extras that are tested in an environment of their own.
APART = sorted(set(PROJECT["optional-dependencies"]) & {path.name for path in (ROOT / "tests" / "engines").iterdir()})
YAML = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "CITATION.cff",
]  # fmt: skip


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> dict:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def requirements(extra: str | None = None) -> dict[str, str]:
    """name -> lower bound of all that pyproject.toml names for an extra, or without those that APART has; each once."""
    extras = PROJECT["optional-dependencies"]
    lines = [line for name, lines in extras.items() if name not in APART for line in lines]
    found: dict[str, str] = {}
    for line in extras[extra] if extra else [*PROJECT["dependencies"], *lines]:
        if not line.startswith("equipoise["):
            parts = re.fullmatch(r"([\w-]+)>=([\w.]+)(?:;.*)?", line.replace(" ", ""))
            assert parts is not None, f"one lower bound and nothing else: {line}"
            name, bound = parts.groups()
            assert found.setdefault(plain(name), bound) == bound, f"two lower bounds of {name}"
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def packed(built: Path) -> set[str]:
    """Paths in the sdist, without the folder of its name and version."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(next(built.glob("*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return email.message_from_bytes(wheel.read(f"equipoise-{VERSION}.dist-info/METADATA"))


def test_the_sdist_holds_what_git_holds(packed):
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked sdist: what git holds is known in a clone alone")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip(f"what git holds is not known, since git refuses: {listed.stderr.strip()}")
    there = {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    assert not there - packed, "add it to [tool.hatch.build.targets.sdist]"


def test_an_sdist_of_the_sdist_is_the_same(packed, built, tmp_path):
    """So what is tested from an unpacked sdist is what a distribution would build from it; needs no git."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / f"equipoise-{VERSION}", capture_output=True, check=True, timeout=300)
    with tarfile.open(tmp_path / f"equipoise-{VERSION}.tar.gz") as archive:
        assert {name.partition("/")[2] for name in archive.getnames()} == packed


def test_the_sdist_holds_no_leftovers(packed):
    wrong = re.compile(r"(^|/)(\.venv[^/]*|__pycache__|\.git|\.hypothesis|build|dist|runs)(/|$)|\.pyc$")
    assert not [name for name in packed if wrong.search(name)]


def test_the_wheel_is_the_package_with_its_marker_and_data(wheel):
    names = set(wheel.namelist())
    source = ROOT / "src"
    files = {path.relative_to(source).as_posix() for path in (source / "equipoise").rglob("*") if path.is_file()}
    assert "equipoise/py.typed" in files
    assert {name for name in names if ".dist-info/" not in name} == {
        name for name in files if "__pycache__" not in name
    }
    assert f"equipoise-{VERSION}.dist-info/licenses/LICENSE" in names


def test_the_metadata_says_who_and_where(metadata):
    urls = dict(value.split(", ", 1) for value in metadata.get_all("Project-URL", []))
    assert urls == PROJECT["urls"]
    assert all(url.startswith(HOME) for url in urls.values())
    assert metadata["Author"] == "The equipoise authors"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_a_package_index_finds_the_pictures_and_pages(metadata):
    readme = metadata.get_payload()
    assert isinstance(readme, str) and metadata["Description-Content-Type"] == "text/markdown"
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme)
    raw = HOME.replace("github.com", "raw.githubusercontent.com")
    assert pictures == [f"{raw}/v{VERSION}/docs/experts.svg"]
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert f"{HOME}/blob/v{VERSION}/docs/policies.md" in links
    assert all(link.startswith("https://") for link in links)
    relative = re.findall(r"\]\(((?!https?:)[^)]+)\)", text_of("README.md"))
    assert len(relative) == sum(link.startswith((HOME, raw)) for link in links) > 5  # each of them, and only once
    assert all((ROOT / path.partition("#")[0]).exists() for path in relative)


def test_the_oldest_packages_are_the_lower_bounds():
    lines = [line for line in text_of("requirements-oldest.txt").splitlines() if not line.startswith("#")]
    assert dict(line.split("==") for line in lines) == requirements()
    assert lines == sorted(lines)


def test_the_lock_is_not_below_the_lower_bounds():
    lock = pins("requirements.lock")
    assert not {name for name, bound in requirements().items() if numbers(lock[name]) < numbers(bound)}


@pytest.mark.parametrize("extra", APART)
def test_an_environment_of_its_own_is_the_lock_and_what_an_extra_adds(extra):
    own, lock = pins(f"tests/engines/{extra}/requirements.lock"), pins("requirements.lock")
    assert lock.items() <= own.items()
    assert all(numbers(own[name]) >= numbers(bound) for name, bound in requirements(extra).items())


def pins(name: str) -> dict[str, str]:
    lines = (line.lower().split("==") for line in text_of(name).splitlines() if "==" in line)
    return {plain(package): version for package, version in lines}


def plain(package: str) -> str:
    """As package indexes compare names; pip writes any."""
    return re.sub(r"[-_.]+", "-", package)


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_yaml_parses(path):
    assert isinstance(parsed(path), dict)


def test_ci_tests_the_pythons_that_are_promised():
    matrix = parsed(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    promised = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", one)]
    assert matrix["python"] == promised
    assert f">={promised[0]}" == PROJECT["requires-python"]
    assert matrix["packages"] == ["newest", "oldest"]
    assert {one["packages"]: one["target"] for one in matrix["include"]} == {"newest": "test", "oldest": "test-oldest"}


@pytest.mark.parametrize("name", ["ci", "engines", "release"])
def test_workflows_name_what_there_is(name):
    """Their make targets and paths exist, and actions are pinned to a major version."""
    workflow, text = parsed(ROOT / f".github/workflows/{name}.yml"), text_of(f".github/workflows/{name}.yml")
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), flags=re.MULTILINE))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    for step in steps:
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step.get("uses", "a/b@v1"))
        for command in re.findall(r"^make (.*)$", step.get("run", ""), flags=re.MULTILINE):
            assert {word for word in command.split() if re.fullmatch(r"[a-z-]+", word)} <= targets
    assert all((ROOT / path).exists() for path in re.findall(r"\btests/[\w/]+", text))
    extras = re.findall(r"\[([a-z,]+)\]\"", text)
    assert all(set(one.split(",")) <= set(PROJECT["optional-dependencies"]) for one in extras)


def test_every_engine_with_a_lock_is_tried_at_night():
    matrix = parsed(ROOT / ".github/workflows/engines.yml")["jobs"]["engine"]["strategy"]["matrix"]
    assert matrix["engine"] == sorted(path.parent.name for path in (ROOT / "tests/engines").glob("*/requirements.lock"))


def test_only_the_step_that_publishes_may_sign_in():
    workflow = parsed(ROOT / ".github/workflows/release.yml")
    assert workflow["permissions"] == {"contents": "read"}
    allowed = {name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})}
    assert allowed == {"publish"} and workflow["jobs"]["publish"]["needs"] == "test"
    assert "secrets." not in text_of(".github/workflows/release.yml")


@pytest.mark.parametrize(
    ("tag", "version", "heading", "good"),
    [
        ("v1.2.0", "1.2.0", "## [1.2.0] - 2026-12-01", True),
        ("v1.2.1", "1.2.0", "## [1.2.0] - 2026-12-01", False),
        ("v1.2.0", "1.1.0", "## [1.2.0] - 2026-12-01", False),
        ("v1.2.0", "1.2.0", "## [1.1.0] - 2026-11-01", False),
        ("v1.2.0", "1.2.0", "", False),
    ],
)
def test_a_release_needs_one_version_everywhere(tag, version, heading, good, tmp_path):
    steps = parsed(ROOT / ".github/workflows/release.yml")["jobs"]["build"]["steps"]
    program = next(
        re.search(r"<<'CHECK'\n(.*)^CHECK$", s["run"], re.DOTALL | re.MULTILINE)
        for s in steps
        if "TAG" in s.get("env", {})
    )
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n', encoding="utf-8")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n{heading}\n", encoding="utf-8")
    assert program is not None
    streams = {"input": program[1], "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-"], cwd=tmp_path, env={"TAG": tag}, timeout=60, **streams)
    assert (done.returncode == 0) == good, done.stderr
    assert good or "expected one version" in done.stderr


def test_issue_forms_have_what_github_asks_for():
    for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        form = parsed(path)
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            assert all(one["type"] == "markdown" or one["attributes"]["label"] for one in form["body"])
            ids = [one["id"] for one in form["body"]]
            assert len(ids) == len(set(ids))


def test_the_citation_is_complete_and_of_this_version():
    cff = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(cff)
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software"
    assert (cff["version"], cff["license"], cff["repository-code"]) == (VERSION, PROJECT["license"], HOME)
    assert cff["authors"] == PROJECT["authors"]
    for one in cff["references"]:
        assert {"type", "title", "authors", "url"} <= set(one)
        assert one["url"] in text_of("README.md")
    assert len(cff["references"]) == 2


def test_the_version_is_the_package_s():
    assert f'__version__ = "{VERSION}"' in text_of("src/equipoise/__init__.py")


@pytest.mark.parametrize("name", ["CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"])
def test_files_for_people_name_no_other_home(name):
    """The project's address stands in pyproject.toml; elsewhere only where a format asks for it."""
    addresses = re.findall(r"https://github\.com/[\w./-]+", text_of(name))
    assert addresses == ([HOME] if name == "CITATION.cff" else [])
