"""The package's shape: kernels/ and integrations/ at the top of the repository, installed inside hf_paged."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"hf_paged": "hf_paged", "hf_paged/kernels": "kernels", "hf_paged/integrations": "integrations"}
"""Folder in the wheel -> folder in the repository."""

IMPORT = "import hf_paged.kernels.reference, transformers"


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Runs a command with no path of this process in its way; returns what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} failed in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_files() -> set[str]:
    """Every Python file of the package, named as the wheel must name it."""
    return {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for package, folder in ROOMS.items()
        for file in (ROOT / folder).rglob("*.py")
    }


def test_imports_from_the_repository_root() -> None:
    run([sys.executable, "-c", IMPORT], cwd=ROOT)


def test_imports_from_elsewhere(tmp_path: Path) -> None:
    run([sys.executable, "-c", IMPORT], cwd=tmp_path)


def test_kernels_is_no_regular_package() -> None:
    """With an __init__.py it would shadow, in the root, the `kernels` package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree as it is, built from a copy: an old build/ folder would put its own files into it."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in ROOMS.values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    out = tmp_path_factory.mktemp("wheel")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    run([*pip_wheel, str(tree)], cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "hf_paged/kernels/reference.py" in names
    assert "hf_paged/py.typed" in names
    folder = ROOT / "integrations" / "openai_server" / "live"
    live = [file.name for file in folder.iterdir() if file.suffix in (".html", ".css", ".js")]
    assert live and {f"hf_paged/integrations/openai_server/live/{name}" for name in live} <= names
    assert python_files() == {name for name in names if name.endswith(".py")}


@pytest.mark.slow
def test_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    empty = tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    show = f"{IMPORT}, hf_paged.integrations; print(hf_paged.__file__, hf_paged.kernels.reference.__file__, sep='\\n')"
    printed = run([sys.executable, "-c", show], cwd=empty, PYTHONPATH=str(site)).split("\n")
    assert [Path(line) for line in printed[:2]] == [
        site / "hf_paged" / "__init__.py",
        site / "hf_paged" / "kernels" / "reference.py",
    ]


def test_no_two_test_files_have_one_name() -> None:
    """Without packages, pytest takes the second for the first."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
