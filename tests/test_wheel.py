"""The wheel has every module and data file of the source tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
DATA = ("**/*.lua", "py.typed", "services/background_jobs/README.md")


def test_the_wheel_has_every_module_and_data_file(tmp_path: Path) -> None:
    # Built from a copy: setuptools writes build/ and *.egg-info beside the sources, and a stale build/lib there
    # would put files into the wheel that the tree no longer has.
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(SOURCE, copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    expected = {f"toolfleet/{path.relative_to(SOURCE)}" for path in SOURCE.rglob("*.py")}
    expected |= {f"toolfleet/{path.relative_to(SOURCE)}" for pattern in DATA for path in SOURCE.glob(pattern)}
    assert packed == expected
