"""Compiling and keeping kernels, without a GPU: the cache, two processes at once, torn files, errors; and the environment."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import slidesparse

from slidesparse_nb import doctor, env
from slidesparse_nb.cuda.jit import cache as jit
from slidesparse_nb.cuda.jit import nvrtc
from slidesparse_nb.errors import UnsupportedError

SOURCE, DEFINES, ARCH = "common/rows.cu", {"FROM": 4, "TO": 2, "LIFT": 0}, "sm_80"
SOURCES = sorted(str(p.relative_to(jit.source_folder())) for p in jit.source_folder().rglob("*.cu"))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is compiled from here on."""
    names: list[str] = []
    real = nvrtc.Nvrtc.compile

    def compile(self: nvrtc.Nvrtc, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
        names.append(name)
        return real(self, source, name, options)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", compile)
    return names


def test_compiled_once_and_kept(cache: Path, compiled: list[str]) -> None:
    built = jit.build(SOURCE, DEFINES, ARCH)
    assert built.folder.parent == cache
    assert sorted(p.name for p in built.folder.iterdir()) == ["build.log", "kernel.cu", "kernel.cubin", "sha256"]
    assert (
        built.folder / "kernel.cu"
    ).read_text() == '#define FROM 4\n#define TO 2\n#define LIFT 0\n#include "common/rows.cu"\n'
    assert built.cubin.read_bytes()[:4] == b"\x7fELF"
    assert 0 < built.registers < 256
    assert built.spills == built.stack == 0
    assert jit.build(SOURCE, DEFINES, ARCH) == built
    assert compiled == [str(built.folder / "kernel.cu")]
    assert not list(cache.glob(".building-*"))


def test_everything_that_decides_is_in_the_name(cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {jit.build(SOURCE, DEFINES, ARCH).folder}
    folders.add(jit.build(SOURCE, DEFINES | {"TO": 3}, ARCH).folder)
    folders.add(jit.build(SOURCE, DEFINES, "sm_90").folder)
    monkeypatch.setattr(jit, "OPTIONS", (*jit.OPTIONS, "-fmad=false"))
    folders.add(jit.build(SOURCE, DEFINES, ARCH).folder)
    texts = jit._included(SOURCE)
    assert {SOURCE, "common/types.cuh"} <= set(texts)
    changed = {**texts, "common/types.cuh": texts["common/types.cuh"] + "\n"}
    monkeypatch.setattr(jit, "_included", lambda source: changed)
    monkeypatch.setattr(jit, "_read", lambda source: changed)
    folders.add(jit.build(SOURCE, DEFINES, ARCH).folder)
    older = nvrtc.Nvrtc(nvrtc.load().path)
    older.version = (0, 0)
    folders.add(jit.build(SOURCE, DEFINES, ARCH, older).folder)
    assert len(folders) == len(compiled) == 6


def test_sources_are_read_once_and_again_before_they_are_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, read, files = jit.build(SOURCE, DEFINES, ARCH), jit._read, []
    monkeypatch.setattr(jit, "_read", lambda source: files.append(source) or read(source))
    assert jit.build(SOURCE, DEFINES, ARCH) == built
    assert not files
    jit.build(SOURCE, DEFINES | {"TO": 3}, ARCH)
    assert files == [SOURCE]
    monkeypatch.setattr(jit, "_read", lambda source: {**read(source), SOURCE: "another text"})
    assert jit.build(SOURCE, DEFINES, ARCH) == built
    with pytest.raises(UnsupportedError, match=r"^common/rows.cu: has changed since this process .*; start the process again$"):
        jit.build(SOURCE, DEFINES | {"LIFT": 8}, ARCH)
    assert not list(cache.glob(".building-*"))


@pytest.mark.parametrize("damage", ["cut", "changed", "no stamp", "no cubin"])
def test_a_torn_cubin_is_compiled_again(cache: Path, compiled: list[str], damage: str) -> None:
    built = jit.build(SOURCE, DEFINES, ARCH)
    whole = built.cubin.read_bytes()
    if damage == "no stamp":
        (built.folder / "sha256").unlink()
    elif damage == "no cubin":
        built.cubin.unlink()
    else:
        built.cubin.write_bytes(whole[:-1] + (b"" if damage == "cut" else bytes([whole[-1] ^ 1])))
    for _ in range(2):
        again = jit.build(SOURCE, DEFINES, ARCH)
        assert (again.folder, len(compiled)) == (built.folder, 2)
    assert hashlib.sha256(again.cubin.read_bytes()).hexdigest() == (again.folder / "sha256").read_text()


def test_two_processes_at_once(cache: Path) -> None:
    code = f"from slidesparse_nb.cuda.jit import cache; print(cache.build({SOURCE!r}, {DEFINES!r}, {ARCH!r}).cubin)"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(paths) == 1
    assert [p.name for p in cache.iterdir()] == [Path(paths.pop()).parent.name]


def test_an_error_of_the_compiler_is_shown_with_its_source(cache: Path) -> None:
    with pytest.raises(jit.KernelError) as caught:
        jit.build(SOURCE, {"FROM": "nonsense"}, ARCH)
    message = str(caught.value)
    assert message.startswith("common/rows.cu: does not compile for sm_80: ")
    assert 'identifier "nonsense" is undefined; its text is in ' in message
    assert "\n" not in message  # which a terminal would show as an escape
    path = re.search(r"its text is in (\S+), more in (\S+)$", message)
    assert path
    assert Path(path[1]).read_text().startswith("#define FROM nonsense\n")
    assert "typedef Element<FROM>" in Path(path[2]).read_text()  # the line that it is about
    assert {p.name for p in cache.iterdir()} == {Path(path[1]).name, Path(path[2]).name}


@pytest.mark.parametrize(
    ("log", "told"),
    [
        ("/errors/k.cu(3): warning #177-D: unused\nk.cu(9): error #20-D: no\n1 error detected", "k.cu(9): error #20-D: no"),
        ("k.cu(3): warning #177-D: unused\nptxas fatal   : Unresolved extern", "ptxas fatal   : Unresolved extern"),
        ("/errors/k.cu(3): warning #1: w\nptxas ptx input, line 29; error   : No", "ptx input, line 29; error   : No"),
        ("out of luck", "out of luck"),
    ],
)  # fmt: skip
def test_the_first_error_is_told_and_no_warning(cache: Path, monkeypatch: pytest.MonkeyPatch, log: str, told: str) -> None:
    def fails(*_: object) -> None:
        raise nvrtc.CompileError(log)

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", fails)
    with pytest.raises(jit.KernelError) as caught:
        jit.build(SOURCE, {"FROM": "nonsense"}, ARCH)
    assert told in str(caught.value)
    assert "warning" not in str(caught.value)


def test_an_architecture_that_the_compiler_does_not_know(cache: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"does not compile for sm_35; install a newer one$"):
        jit.build(SOURCE, DEFINES, "sm_35")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match="set SLIDESPARSE_CACHE_DIR to a folder that can"):
        jit.build(SOURCE, DEFINES, ARCH)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, int]]]:
    """Paths -> versions of the compilers that are found; to be filled."""
    versions: dict[str, tuple[int, int]] = {}

    def found(path: str) -> SimpleNamespace:
        if path not in versions:
            raise OSError(path)
        return SimpleNamespace(path=path, version=versions[path])

    monkeypatch.setattr(nvrtc, "candidates", lambda: ["/nowhere/libnvrtc.so.13", *versions])
    monkeypatch.setattr(nvrtc, "Nvrtc", found)
    nvrtc.load.cache_clear()
    yield versions
    nvrtc.load.cache_clear()


def test_no_compiler(installed: dict[str, tuple[int, int]]) -> None:
    with pytest.raises(UnsupportedError, match=r"no libnvrtc.so was found, .*; pip install nvidia-cuda-nvrtc"):
        nvrtc.load()


def test_the_compiler_of_a_cuda_version(installed: dict[str, tuple[int, int]]) -> None:
    installed |= {"old": (12, 4), "new": (13, 5), "right": (12, 9), "another": (12, 6)}
    assert [nvrtc.load(major).path for major in (None, 12, 13, 14)] == ["new", "right", "new", "new"]


def test_compilers_that_are_too_old(installed: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, wherever one is asked for."""
    installed |= {"/usr/lib/libnvrtc.so.12": (12, 4), "/older/libnvrtc.so.11": (11, 8)}
    sentence = "nvrtc: /usr/lib/libnvrtc.so.12 is of CUDA 12.4, but the kernels need CUDA 12.5 or newer; pip install"
    for major in (None, 12, 13):
        with pytest.raises(UnsupportedError, match=f"^{sentence}"):
            nvrtc.load(major)
    monkeypatch.setitem(sys.modules, "cupy", None)
    finding = next(finding for finding in doctor.diagnose() if finding.part == "NVRTC")
    assert finding.state == "broken"
    assert finding.text.startswith(sentence)
    done = slidesparse("build", "--arch", "sm_90", "--pattern", "6:8", "--dtype", "int8")
    assert done.exit_code == 5
    assert done.stderr.startswith(f"error: {sentence}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("source", SOURCES)
def test_every_file_compiles_alone(source: str, cache: Path) -> None:
    arch = {"sm90": "sm_90a", "sm100": "sm_100a"}.get(source.split("/")[0], "sm_80")
    assert jit.build(source, {}, arch).registers


def test_no_header_of_the_toolkit_is_needed() -> None:
    for path in jit.source_folder().rglob("*.cu*"):
        assert not re.search(r"#include\s*<", path.read_text()), path


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", "~/kernels")
    assert env.cache_dir() == Path.home() / "kernels"
    monkeypatch.delenv("SLIDESPARSE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert env.cache_dir() == Path("/elsewhere/slidesparse_nb")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert env.cache_dir() == Path.home() / ".cache" / "slidesparse_nb"
    for value, meant in (("1", True), ("yes", True), ("0", False), ("", False)):
        monkeypatch.setenv("SLIDESPARSE_DEBUG", value)
        assert env.debug() is meant
    monkeypatch.delenv("SLIDESPARSE_DEBUG")
    assert not env.debug()
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert env.toolkits() == ["/opt/cuda"]


def test_the_environment_is_read_in_one_place() -> None:
    """And told in README, in the words of env.py."""
    package = Path(env.__file__).parent
    assert env.__doc__
    told = {(names, words) for names, words in re.findall(r"^([A-Z_]+(?:, [A-Z_]+)*)  +(.+)$", env.__doc__, re.MULTILINE)}
    read = {name for name in re.findall(r'"([A-Z_]{4,})"', Path(env.__file__).read_text())}
    assert {name for names, _ in told for name in names.split(", ")} == read
    rows = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \| (.+) \|$", (package.parent / "README.md").read_text(), re.MULTILINE)
    assert {(names.replace("`", ""), words.replace("`", "")) for names, words in rows} == {
        (names, words.replace("`", "")) for names, words in told
    }
    for path in package.rglob("*.py"):
        if path.name != "env.py":
            assert not re.search(r"os\.environ|os\.getenv", path.read_text()), path
