"""Where a run came from."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dasmil import provenance
from dasmil.errors import InputError


def test_each_start_is_kept_with_all_that_decides_it(tmp_path):
    for seed, world in ((3, 1), (None, 2)):
        provenance.record_start(tmp_path, seed, ["fit", "--data.bags", "my bags"], world)
    first, second = json.loads((tmp_path / "provenance.json").read_text())
    assert (first["seed"], second["seed"]) == (3, None)
    assert (first["processes"], second["processes"]) == (1, 2)
    assert first["command"] == "python -m dasmil fit --data.bags 'my bags'"
    assert first["versions"]["torch"] == version("torch")
    assert set(first["versions"]) == {"python", *provenance.PACKAGES}
    assert first["time"] <= second["time"]


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_file_that_is_no_list_of_starts_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "provenance.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"provenance.json: not the list of a run's starts"):
        provenance.record_start(tmp_path, 0, ["fit"], 1)
    assert path.read_text() == text


def test_the_module_needs_no_torch(tmp_path):
    """And says nothing of GPUs then."""
    code = (
        "import sys, pathlib; from dasmil.provenance import record_start;"
        f"record_start(pathlib.Path({str(tmp_path)!r}), 0, ['fit'], 1);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (start,) = json.loads((tmp_path / "provenance.json").read_text())
    assert start["devices"]["cuda"] is None and start["devices"]["gpus"] == []
    assert start["versions"]["torch"] == version("torch")


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git repository whose file plays the part of dasmil's source."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    source = tmp_path / "package" / "provenance.py"
    source.parent.mkdir()
    source.write_text("one")
    monkeypatch.setattr(provenance, "__file__", str(source))
    return source.parent


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    command = ["git", "-C", str(folder), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_revision_is_the_commit_and_says_when_files_differ(repository):
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    commit = git(repository, "rev-parse", "HEAD")
    assert provenance.git_revision() == commit
    (repository / "untracked.txt").write_text("does not matter")
    assert provenance.git_revision() == commit
    (repository / "provenance.py").write_text("two")
    assert provenance.git_revision() == commit + "-dirty"


def test_the_repository_of_a_git_hook_is_not_taken_for_it(repository, tmp_path, monkeypatch):
    git(repository, "init", "-q")
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert provenance.git_revision() == commit


def test_a_package_inside_somebody_else_s_repository_has_not_its_revision(repository):
    git(repository.parent, "init", "-q")
    git(repository.parent, "commit", "-qm", "theirs", "--allow-empty")
    assert provenance.git_revision() is None


def test_a_package_installed_from_git_knows_its_commit(repository, monkeypatch):
    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return json.dumps({"vcs_info": {"commit_id": "abc"}})

    monkeypatch.setattr(provenance, "distribution", lambda _: Installed())
    assert provenance.git_revision() == "abc"


def test_without_git_nothing_fails_and_nothing_is_claimed(repository, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert provenance.git_revision() is None
