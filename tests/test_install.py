"""What a wheel and a source distribution hold, and that neither needs torch to be made."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments, blocked=None, **environment):
    """setup.py with `arguments`; importing anything beneath the folder `blocked` goes first."""
    environment = {**os.environ, "PATCHGEN_FAST_BUILD": "none", **environment}
    if blocked:
        environment["PYTHONPATH"] = str(blocked)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def no_torch(tmp_path):
    """A folder that makes `import torch` fail."""
    folder = tmp_path / "blocked"
    folder.mkdir()
    (folder / "torch.py").write_text("raise ImportError('torch is not to be imported here')\n")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without native part, made where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "torch.py").write_text("raise ImportError('torch is not to be imported here')\n")
    setup(
        "egg_info", "--egg-base", str(folder),
        "build", "--build-base", str(folder / "build"),
        "bdist_wheel", "--bdist-dir", str(folder / "bdist"), "--dist-dir", str(folder / "dist"),
        blocked=folder,
    )  # fmt: skip
    (path,) = (folder / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_its_build_record(wheel):
    names = set(wheel.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "patchgen_fast").rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so", ".json")
    }
    found = {name for name in names if ".dist-info/" not in name}
    assert found == sources | {"patchgen_fast/build_record.json"}
    record = json.loads(wheel.read("patchgen_fast/build_record.json"))
    assert record["requested"] == "none" and record["operators"] is False


def test_the_wheel_names_licence_dependencies_and_command(wheel):
    (path,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    facts = email.message_from_bytes(wheel.read(path))
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts["Requires-Python"] == ">=3.10"
    needed = [line for line in facts.get_all("Requires-Dist") if "extra ==" not in line]
    assert [line.partition(">")[0] for line in needed] == ["torch", "click"]
    assert {"bench", "report", "peers", "test", "dev"} <= set(facts.get_all("Provides-Extra"))
    (path,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert b"patchgen-fast = patchgen_fast.cli:main" in wheel.read(path)
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_source_distribution_builds_elsewhere(no_torch, tmp_path):
    setup(
        "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path),
        blocked=no_torch,
    )  # fmt: skip
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert not [name for name in names if name.endswith((".so", ".o", "build_record.json"))]
        if shutil.which("git") and (ROOT / ".git").exists():
            listed = subprocess.run(
                ["git", "ls-files", "csrc", "patchgen_fast", "requirements", "Makefile"],
                cwd=ROOT, capture_output=True, text=True, check=True,
            )  # fmt: skip
            assert set(listed.stdout.split()) <= names
        assert {"LICENSE", "README.md", "pyproject.toml", "csrc/toolchain.py"} <= names
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build"],
        cwd=source,
        env={**os.environ, "PATCHGEN_FAST_BUILD": "auto", "CXX": "/nonexistent/c++"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(source.glob("build/lib*/patchgen_fast/build_record.json"))
