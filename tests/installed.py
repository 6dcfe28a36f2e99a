"""What a wheel holds, run by the Python that it is installed in, away from the checkout: make wheel.

python installed.py commands   without any extra: every command tells its help, and doctor finds nothing broken
python installed.py kernels    with CuPy and matplotlib: imports modules (but of PyTorch), compiles every kernel source
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

from slidesparse_nb.tools.cli import COMMANDS

import slidesparse_nb
from slidesparse_nb.core.pattern import Pattern
from slidesparse_nb.core.scheme import Scheme
from slidesparse_nb.cuda import ahead_of_time
from slidesparse_nb.cuda.jit import cache

ROOT = Path(sys.prefix).resolve()


def kernels() -> None:
    names = [found.name for found in pkgutil.walk_packages(slidesparse_nb.__path__, "slidesparse_nb.")]
    apart = ("slidesparse_nb.integrations.", "slidesparse_nb.tools.study.")  # need PyTorch: test-integrations
    names = [name for name in names if not name.startswith(apart)]
    for name in names:
        file = importlib.import_module(name).__file__
        assert file is None or ROOT in Path(file).resolve().parents, f"{file} is not of the installed package"
    print(f"{len(names)} modules imported")

    folder = cache.source_folder()
    assert ROOT in folder.resolve().parents, f"{folder} is not of the installed package"
    jobs = {}
    for capability in ahead_of_time.CAPABILITIES:
        jobs["common/rows.cu", capability] = ("common/rows.cu", {}, cache.architecture(capability))
        for job, _ in ahead_of_time._jobs([capability], [Pattern(6, 8)], [Scheme.of("int8")], "bfloat16"):
            jobs.setdefault((job[0], capability), job)
    sources = {path.relative_to(folder).as_posix() for path in folder.rglob("*.cu")}
    assert sources == {source for source, _ in jobs}, f"{sources} are installed, and not all are compiled here"
    assert all(built.registers for built in ahead_of_time.compile_all(list(jobs.values())))
    print(f"{len(sources)} sources compiled, {len(jobs)} kernels")


def commands() -> None:
    command = Path(sys.executable).with_name("slidesparse")
    for arguments in ([], *([name] for name in COMMANDS)):
        done = subprocess.run([command, *arguments, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("Usage: slidesparse"), done.stdout
    subprocess.run([command, "doctor"], check=True)


if __name__ == "__main__":
    {"commands": commands, "kernels": kernels}[sys.argv[1]]()
