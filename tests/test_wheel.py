"""Every file of the package is in the wheel: by what setup.cfg says. `make wheel` installs one and runs it."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_setup_cfg_finds_every_file() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    places = dict(line.replace(" ", "").split("=") for line in config["options"]["package_dir"].split("\n") if line)
    for package in config["options"]["packages"].split():
        folder = ROOT / places.get(package, package)
        globs = config["options.package_data"][package].replace(",", " ").split()
        found = {path for glob in globs for path in folder.glob(glob)}
        files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert found == files, f"{package}: package_data of setup.cfg leaves out {sorted(map(str, files - found))}"
        assert files
