"""The wheel and the source distribution: what is in them, and that they work where only the required packages are."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import peft_kasa

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"torch", "peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "packaging", "tqdm"}
USE = """
import sys
import torch, peft, peft_kasa
assert peft_kasa.__file__.startswith(sys.argv[1]), peft_kasa.__file__
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 6)), peft_kasa.KaSAConfig(r=2, target_modules=["0"]))
model(torch.ones(1, 8)).sum().backward()
assert not {"trl", "datasets", "bitsandbytes", "altair", "matplotlib"} & set(sys.modules)
"""


def needed(name: str, known: set[str]) -> set[str]:
    """A distribution and all that it requires, extras apart."""
    name = canonicalize_name(name)
    if name in known:
        return known
    known.add(name)
    for line in requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, known)
    return known


def link(name: str, folder: Path) -> None:
    """Puts what a distribution installed, and nothing else, into a folder that can be on sys.path."""
    found = distribution(name)
    for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        if not (folder / top).exists():
            (folder / top).symlink_to(str(found.locate_file(top)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = [*(ROOT / "peft_kasa").rglob("*"), *(ROOT / "peft_kasa_cli").rglob("*")]
    assert names == {str(path.relative_to(ROOT)) for path in source if path.suffix == ".py" or path.name == "py.typed"}


def test_the_wheel_says_what_it_is_and_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    said = next(name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(archive.read(said).decode())
    assert metadata["Version"] == peft_kasa.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "quant", "report", "docs", "test"} <= set(metadata.get_all("Provides-Extra", []))
    required = {Requirement(line).name for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert required == REQUIRED


def test_the_source_distribution_builds_the_same(built: Path, wheel: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} <= inside
    assert {"pyproject.toml", "README.md", "LICENSE"} <= inside


def test_the_wheel_works_where_only_what_it_needs_is_installed(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    known: set[str] = set()
    for name in REQUIRED:
        needed(name, known)
    for name in known:
        link(name, tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + USE
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
