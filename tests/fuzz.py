"""Files nobody meant, and machines that fail: make fuzz SECONDS=60, or python tests/fuzz.py [--seed S] [--count N | --only I].

A case makes a checkpoint (dense or packed; a file, a folder, shards; plain, damaged, or with a forged header), then loads,
inspects, verifies, packs and unpacks it with random options, some under faults: a full disk, a failing one, a kill. Rules:

    only SlideSparseError and OSError come out, with one printable line of bounded length, and no warning of a library before it
    the source is as it was; after an error nothing is left but what an OSError documents, and --resume continues from that
    what is accepted verifies, loads, unpacks, and equals what NumPy (`reference`) makes of the source
    time and memory are bounded

Cases depend on the seed and their number alone. A finding is printed with the command that repeats it; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import hypothesis
import ml_dtypes
import models
import numpy as np
from hypothesis import strategies as st

import slidesparse_nb as ss
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import PACKED
from slidesparse_nb.errors import LONGEST_MESSAGE

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
CODES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL", "I64", "U16", "C64", "F4", "F8_E8M0", "X", "")
PATTERNS = ("6:8", "2:4", "4:6", "8:10", "14:16", "30:32")
NAMES = (
    "fc", "a", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "lm_head",
    "x.weight", "re:(", "re:.*", "*", "x[0", "", ".", "weight_shape", "fc.weight_packed", "层.ü", "\x1b[31mred\n", "n" * 3000,
    "embed", "experts.0.w1",
)  # fmt: skip
ENDS = (
    ".weight_scale",
    ".bias",
    ".weight_shape",
    ".weight_meta",
    ".weight_packed",
    ".weight_zero_point",
    ".weight_scale_inv",
    "",
    "s",
)
JSON = (
    '{"a": 1e999}', "{", "[]", "null", "", "\ufeff{}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "<html>",
    '{"a": ' + "9" * 5000 + "}", '{"a":' * 5000, '{"\\u0000": 1}', "version https://git-lfs.github.com/spec/v1\noid",
)  # fmt: skip
CONFIG_KEYS = (
    "vocab_size",
    "model_type",
    "quantization_config",
    "compression_config",
    "text_config",
    "tie_word_embeddings",
    "x",
)
SECONDS_A_CALL, NEW_MEMORY = 30, 3 << 30


class Finding(Exception):
    """An invariant does not hold."""


class Case:
    """One case: its random numbers, its folder, and what it has done so far."""

    def __init__(self, seed: str, root: Path) -> None:
        self.rng, self.root, self.told = random.Random(seed), root, []
        self.np = np.random.default_rng(self.rng.getrandbits(64))
        self.calm = self.chance(0.5)  # names and numbers that are likely to be packed

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # ---- files

    def weight(self, n: int, k: int) -> np.ndarray:
        w = self.np.standard_normal((n, k)).astype(np.float32)
        if self.chance(0.4) and k:
            w = reference.prune(w, ss.Pattern.of(self.rng.choice(PATTERNS)))
        if self.chance(0.02 if self.calm else 0.15) and w.size:
            w.flat[self.rng.randrange(w.size)] = self.rng.choice([np.nan, np.inf, -0.0, 3e38, 1e-40, 70000.0, 1e-8])
        if self.chance(0.05):
            w[:] = 0
        with np.errstate(all="ignore"):
            return w.astype(self.rng.choice([np.float32, np.float16, BF16, BF16]))

    def dense(self) -> dict[str, np.ndarray]:
        """Tensors of a made-up model."""
        found: dict[str, np.ndarray] = {}
        eight = self.chance(0.3) and self.rng.choice([np.dtype(np.int8), FP8])
        for name in self.rng.sample(NAMES[:5] if self.calm else NAMES, self.rng.choice([1, 1, 2, 3, 5])):
            n, k = self.rng.choice([0, 1, 3, 4, 17]), self.rng.choice([0, 1, 7, 8, 16, 31, 32, 130])
            n, k = (max(n, 1), max(k, 16)) if self.calm else (n, k)
            w = self.weight(n, k)
            if eight and self.chance(0.9):
                finite = np.nan_to_num(w.astype(np.float32), posinf=9, neginf=-9)
                w, scale = reference.quantize(finite, ss.Scheme.of(eight).dtype)
                if self.chance(0.95):
                    found[f"{name}.weight_scale"] = scale if self.chance(0.8) else scale[:1, 0]
            found[f"{name}.weight"] = w
            if self.chance(0.1 if self.calm else 0.2):
                shape = self.rng.choice([(), (1,), (n, 1), (n,), (2, 0, 3)])
                found[name + self.rng.choice(ENDS)] = np.asarray(self.np.standard_normal(shape), np.float32)
        found.pop("__metadata__", None)
        return dict(self.rng.sample(list(found.items()), len(found)))

    def packed(self) -> dict[str, Any]:
        """Packed weights and other tensors, as `save` takes them."""
        pattern, found = self.rng.choice(PATTERNS), {}
        for name, value in self.dense().items():
            w = np.nan_to_num(np.clip(value.astype(np.float32), -9, 9))
            dtype = self.rng.choice(["int8", "bfloat16", "float8_e4m3fn"])
            plain = w.ndim != 2 or self.chance(0.2)
            found[name.removesuffix(".weight")] = w if plain else ss.pack(w, pattern, dtype, prune="magnitude")
        return found

    def checkpoint(self) -> Path:
        """A source of any kind."""
        source = self.root / "in.safetensors"
        if self.chance(0.2) and not self.calm:
            self.forged(source)
        elif self.chance(0.35):
            if not isinstance(self.call("save", lambda: ss.save(source, self.packed())), BaseException) and self.chance(0.3):
                self.folder({source.name: source}, {})
                source = self.root / "in"
        else:
            parts = self.dense()
            if self.chance(0.5):
                models.write(source, parts, self.rng.choice([{}, {"format": "pt"}, {"slidesparse": "{}"}, {"x": "\n" * 9}]))
            else:
                source = self.root / "in"
                shards = min(len(parts), self.rng.choice([1, 1, 2, 3]))
                models.folder(source, parts, shards=shards, config=self.config())
                (source / "pytorch_model.bin").unlink()
        if self.chance(0.1 if self.calm else 0.4):
            self.damage(source)
        return source

    def folder(self, files: dict[str, Path], config: dict[str, Any]) -> None:
        (self.root / "in").mkdir()
        for name, path in files.items():
            shutil.move(path, self.root / "in" / name)
        (self.root / "in" / "config.json").write_text(json.dumps(config))

    def config(self) -> dict[str, Any]:
        value = self.rng.choice([None, 0, 17, 4000, "x" * 5000, [], {}, True, -1, 1e300, {"quant_method": "fp8"}, {"a": [{}]}])
        key = self.rng.choice(CONFIG_KEYS)
        return {key: value} if self.chance(0.3) else {}

    def forged(self, path: Path) -> None:
        """A consistent file whose header nobody would write: any types, shapes, names and metadata, any bytes."""
        header: dict[str, Any] = {}
        end = 0
        bits = {
            "F64": 64,
            "F32": 32,
            "F16": 16,
            "BF16": 16,
            "F8_E4M3": 8,
            "F8_E5M2": 8,
            "I8": 8,
            "U8": 8,
            "BOOL": 8,
            "I64": 64,
            "U16": 16,
        }
        start = b""
        alone = self.chance(0.4)  # then a packed module, which other tensors would spoil
        for name in () if alone else self.rng.sample(NAMES, self.rng.randrange(1, 5)):
            for tail in (".weight", *self.rng.sample(ENDS, 2)):
                code = self.rng.choice(list(bits))
                shape = self.rng.choice(
                    [
                        [4, 32],
                        [0, 2**31 - 1],
                        [2**31 - 1, 0],
                        [0, 0],
                        [],
                        [2],
                        [1, 8],
                        [4, 12],
                        [4, 24],
                        [2**62, 0],
                        [1] * 40,
                        [3, 16],
                    ]
                )
                size = int(np.prod(np.array(shape, object))) * bits[code] // 8
                header[name + tail] = {"dtype": code, "shape": shape, "data_offsets": [end, end := end + size]}
        told = {
            "version": 1,
            "pattern": {"nnz": 6, "group": 8},
            "dtype": self.rng.choice([None, "int8", "bfloat16", "bfloat16"]),
            "tool": "",
        }
        if alone or self.chance(0.5):
            header["__metadata__"] = {"slidesparse": json.dumps(told)}
            end, shape = self.forge_packed(header, end)
            start = shape if alone else b""
        if self.chance(0.2):
            header[self.rng.choice(list(header))] = self.rng.choice(
                [None, 1, {}, [], "x", {"dtype": "F32", "shape": [-1], "data_offsets": [0, 2**63]}]
            )
        write_raw(path, header, (start + self.np.bytes(end % 2**20))[: end % 2**20])

    def forge_packed(self, header: dict[str, Any], end: int) -> tuple[int, bytes]:
        """Add a packed module of an odd shape, whose values are random; where it ends, and what it stores as its shape."""
        n, k = self.rng.choice([(0, 2**31 - 1), (0, 2**31 - 1), (2**31 - 1, 0), (0, 0), (1, 8)])
        ks = ss.Pattern(6, 8).slid_k(k)
        for part, code, shape, width in (
            ("shape", "I64", [2], 8),
            ("packed", "BF16", [n, ks // 2], 2),
            ("meta", "U8", [n, ks // 8], 1),
        ):
            size = int(np.prod(np.array(shape, object))) * width
            header[f"forged.weight_{part}"] = {"dtype": code, "shape": shape, "data_offsets": [end, end := end + size]}
        return end, struct.pack("<qq", n, k)

    def damage(self, source: Path) -> None:
        """Change bytes, length, header entries or JSON of one file of the source."""
        if not source.exists():
            return
        files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file())
        path = self.rng.choice(files)
        data = bytearray(path.read_bytes())
        kind = self.rng.randrange(7)
        if kind == 0 and data:
            for _ in range(self.rng.choice([1, 1, 8, 200])):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        elif kind == 1:
            del data[self.rng.randrange(len(data) + 1) :]
        elif kind == 2:
            at = self.rng.randrange(len(data) + 1)
            data[at:at] = self.rng.randbytes(self.rng.choice([1, 8, 300]))
        elif kind == 3:
            data[:] = self.rng.choice([*(t.encode() for t in JSON), b"PK\x03\x04" + bytes(99), bytes(64), b"\xff" * 9])
        elif kind == 4 and path.suffix == ".safetensors":
            data = self.edited(data)
        elif path.suffix == ".json":
            data = bytearray(self.rng.choice(JSON).encode())
        path.write_bytes(data)
        if self.chance(0.1) and source.is_dir():
            self.rng.choice(
                [
                    lambda: os.symlink("/etc/passwd", source / "link"),
                    lambda: (source / "model.safetensors.x").mkdir(),
                    path.unlink,
                ]
            )()

    def edited(self, data: bytearray) -> bytearray:
        """One value of the header replaced."""
        try:
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            entry = header[name := self.rng.choice(list(header))]
            key = self.rng.choice(list(entry))
        except (ValueError, IndexError, TypeError, KeyError):
            return data
        entry[key] = self.rng.choice([*CODES, [4], [], [0, 0], [2**31, 2**31], [8, 8, 8], None, -1, 2**64, "{}", True])
        if self.chance(0.3):
            header[self.rng.choice([name + ".weight_packed", name.replace("weight", "weight_packed"), "fc"])] = header.pop(name)
        text = json.dumps(header).encode()
        return bytearray(len(text).to_bytes(8, "little") + text + data[8 + length :])

    # ---- calls

    def call(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, or the error it may raise; Finding for any other."""
        self.told.append(what)
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                return work()
        except (ss.SlideSparseError, OSError) as error:
            message = str(error)
            if not message or not message.isprintable() or len(message) > LONGEST_MESSAGE + 5000 * isinstance(error, OSError):
                raise Finding(f"{what}: message {message[:3000]!r} of {len(message)} characters") from error
            return error.with_traceback(None)
        finally:
            if time.process_time() - start > SECONDS_A_CALL:
                raise Finding(f"{what}: took {time.process_time() - start:.0f} s of processor time")

    def options(self) -> tuple[ss.Options, ss.Run]:
        pick = self.rng.choice
        name = pick(NAMES)
        few = self.calm and self.chance(0.8)
        options = ss.Options(
            pattern=pick(PATTERNS),
            scheme=pick(["auto", "auto", "INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16"]),
            prune=pick(["magnitude", "magnitude", "random", *["none"][few:]]),
            seed=pick([0, 7]),
            targets=(name,) if self.chance(0.15) and not few else (),
            ignore=(pick(NAMES),) if self.chance(0.15) else (),
            format=pick(["packed", "packed", "dense"]),
            max_shard_size=pick([None, None, None, 1, 500]),
            skip_bad=self.chance(0.4),
        )
        return options, ss.Run(max_workers=pick([1, 2]), verify=self.chance(0.8))

    # ---- what must hold

    def run(self) -> str:
        """Do it all; what came of it, in a word."""
        source = self.checkpoint()
        if not source.exists():
            return "no source"
        before = contents(self.root)
        loaded = self.call("load", lambda: ss.load(source))
        self.call("inspect", lambda: ss.inspect_checkpoint(source))
        verified = self.call("verify", lambda: ss.verify_checkpoint(source))
        if isinstance(loaded, dict) and not isinstance(verified, BaseException):
            self.unpacked(source, loaded)
        self.same(before, "reading")
        options, run = self.options()
        out = self.root / ("out.safetensors" if source.is_file() and self.chance(0.7) else "out")
        planned = self.call(f"dry run of {options}", lambda: ss.pack_checkpoint(source, out, options, run, dry_run=True))
        self.same(before, "a dry run")
        faulty = self.chance(0.25) and not isinstance(planned, BaseException)
        if faulty:
            made = self.faulty(source, out, options, run)
        else:
            made = self.call(f"pack with {options}, {run}", lambda: ss.pack_checkpoint(source, out, options, run))
        if isinstance(made, BaseException):
            if isinstance(made, OSError):
                raise Finding(f"an OSError without a fault: {made}")
            self.same(before, "a refusal")
            return type(made).__name__
        if isinstance(planned, BaseException):
            raise Finding(f"the dry run refused what was packed: {planned}")
        self.checked(source, out, options, loaded, made)
        self.same({name: data for name, data in before.items()}, "packing", more=out.name)
        return "packed"

    def same(self, before: dict[str, bytes], what: str, more: str = "") -> None:
        now = {name: data for name, data in contents(self.root).items() if not more or name.split("/")[0] != more}
        if now != before:
            names = sorted(name for name in now.keys() | before if now.get(name) != before.get(name))
            raise Finding(f"{what} changed or left {names[:5]}")

    def unpacked(self, source: Path, loaded: dict[str, Any]) -> None:
        """Unpack a verified checkpoint; every module equals what `reference` unpacks."""
        out = self.root / ("u.safetensors" if source.is_file() else "u")
        made = self.call("unpack", lambda: ss.unpack_checkpoint(source, out))
        if not isinstance(made, BaseException):
            dense = self.must("load of the unpacked", lambda: ss.load(out))
            for name, value in loaded.items():
                if not isinstance(value, ss.PackedWeight):
                    equal(f"unpacked {name!r}", dense[name], value)
                elif max(value.n, value.k) < 2**22:  # `reference` works in memory for a whole row
                    equal(f"unpacked {name!r}", dense[f"{name}.weight"], reference.unpack(value))
            remove(out)

    def must(self, what: str, work: Callable[[], Any]) -> Any:
        result = self.call(what, work)
        if isinstance(result, BaseException):
            raise Finding(f"{what} is refused: {type(result).__name__}: {result}")
        return result

    def checked(self, source: Path, out: Path, options: ss.Options, loaded: dict[str, Any], report: ss.Report) -> None:
        """The output verifies, loads, equals what `reference` makes of the source, and is complete for --resume."""
        if options.format == "packed":
            self.must("verify of the output", lambda: ss.verify_checkpoint(out))
            self.must("verify against the source", lambda: ss.verify_checkpoint(out, source))
        again = self.must("resume of a complete output", lambda: ss.pack_checkpoint(source, out, options, ss.Run(resume=True)))
        if not again.already_complete or not again.verified:
            raise Finding("a complete output is not found complete")
        if isinstance(loaded, ss.UnsupportedError):
            return  # a tensor that goes through is of a type that NumPy lacks
        written = self.must("load of the output", lambda: ss.load(out))
        replaced = set()
        for module in report.modules:
            name = module.name
            replaced |= {
                f"{name}.{part}" for part in ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point")
            }
            w, scale = loaded[f"{name}.weight"], None
            dtype = next(t for t in PACKED if t.safetensors == module.stored)
            if w.dtype.itemsize == 1:
                scale = np.broadcast_to(loaded[f"{name}.weight_scale"].astype(np.float32).reshape(-1, 1), (w.shape[0], 1))
            if options.prune != "random":
                pruned = reference.prune(w, options.pattern) if options.prune == "magnitude" else w
                wanted = reference.pack(pruned, options.pattern, dtype, scale=scale)
            if options.format == "packed" and options.prune != "random":
                for part in ("values", "meta", "scale"):
                    equal(f"{name!r}.{part}", getattr(written[name], part), getattr(wanted, part))
            elif options.format == "dense":
                if len(reference.violations(written[f"{name}.weight"], options.pattern)):
                    raise Finding(f"{name!r} breaks the pattern in dense format")
                if options.prune != "random":
                    equal(f"dense {name!r}", zeros_unsigned(written[f"{name}.weight"]), reference.unpack(wanted))
        for name, value in loaded.items():
            if name not in replaced:
                equal(f"copied {name!r}", written[name], value)

    def faulty(self, source: Path, out: Path, options: ss.Options, run: ss.Run) -> Any:
        """Pack with a fault at some system call, then resume without; equal to a run without faults."""
        before = contents(self.root)
        clean = self.call("pack without faults", lambda: ss.pack_checkpoint(source, out, options, run))
        wanted = contents(out)
        remove(out)
        if isinstance(clean, BaseException):
            return clean
        at, kind = self.rng.randrange(1, 60), self.rng.choice(["ENOSPC", "EIO", "full", "kill", "kill torn"])
        what = f"pack with {options}, {run}, {kind} at change {at}"
        if kind.startswith("kill"):
            self.told.append(what)
            in_child(lambda: ss.pack_checkpoint(source, out, options, run), at, torn="torn" in kind)
            failed: Any = None
        else:
            with faults(at, errno.EIO if kind == "EIO" else errno.ENOSPC, lasting=kind == "full"):
                failed = self.call(what, lambda: ss.pack_checkpoint(source, out, options, run))
            if isinstance(failed, ss.SlideSparseError):
                raise Finding(f"{what}: {type(failed).__name__}: {failed}")
            if isinstance(failed, OSError) and not failed.filename:
                raise Finding(f"{what}: names no file: {failed}")
        done = self.must("resume", lambda: ss.pack_checkpoint(source, out, options, ss.Run(resume=True, verify=run.verify)))
        if contents(out) != wanted:
            raise Finding(f"{what}: the resumed output differs")
        self.same(before, what, more=out.name)
        return done


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def contents(path: Path) -> dict[str, bytes]:
    """Every file under a folder, or the file; links as what they lead to."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = {}
    for folder, subfolders, files in os.walk(path):
        for name in (*files, *subfolders):
            place = os.path.join(folder, name)
            data = (
                os.readlink(place).encode()
                if os.path.islink(place)
                else b"/"
                if name in subfolders
                else Path(place).read_bytes()
            )
            found[os.path.relpath(place, path)] = data
    return found


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def zeros_unsigned(a: np.ndarray) -> np.ndarray:
    """-0.0, which the packed form does not keep, as 0.0."""
    return np.where(a.astype(np.float32) == 0, np.zeros((), a.dtype), a)


def equal(what: str, found: Any, wanted: Any) -> None:
    if _facts(found) != _facts(wanted):
        raise Finding(f"{what} is not what it should be")


def _facts(a: Any) -> Any:
    return None if a is None else (a.dtype, a.shape, a.tobytes())


CHANGES = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "mkdir")
FILLING = ("pwrite", "write", "mkdir")


@contextlib.contextmanager
def faults(at: int, code: int, *, lasting: bool) -> Iterator[None]:
    """The at-th change of the file system fails, or (lasting) every one from there that needs room."""
    real = {name: getattr(os, name) for name in CHANGES}
    left = at

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 or (lasting and left < 0 and name in FILLING):
                raise OSError(code, os.strerror(code))
            return real[name](*args, **kwargs)

        return call

    try:
        for name in CHANGES:
            setattr(os, name, failing(name))
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def in_child(work: Callable[[], Any], at: int, *, torn: bool) -> None:
    """Do it in a forked process that is killed at its at-th change of the file system, or half way through a write."""
    if (child := os.fork()) == 0:
        left = at

        def deadly(name: str) -> Callable[..., Any]:
            real = getattr(os, name)

            def call(*args: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    if torn and "write" in name:
                        real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args)

            return call

        for name in CHANGES:
            setattr(os, name, deadly(name))
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    os.waitpid(child, 0)


# ---- hypothesis: headers and JSON of any form ------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(CODES)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4), max_leaves=12
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(CODES) | SCALARS,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | VALUES,
        "data_offsets": VALUES,
    }
)
HEADERS = st.dictionaries(
    st.sampled_from(NAMES).map(lambda name: name + ".weight") | st.text(max_size=9), ENTRY | VALUES, max_size=4
)


def headers(seed: int, count: int, root: Path) -> None:
    """Read files whose headers, and folders whose configs, hypothesis makes up; it prints the smallest that breaks a rule."""
    case = Case(f"{seed}", root)
    path, folder = root / "h.safetensors", root / "folder"
    folder.mkdir()
    models.write(folder / "model.safetensors", {"fc.weight": np.ones((4, 32), np.float32)})

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(
        HEADERS,
        st.binary(max_size=64),
        VALUES | st.dictionaries(st.sampled_from(["quantization_config", "vocab_size", "model_type"]), VALUES),
    )
    def read(header: Any, data: bytes, config: Any) -> None:
        write_raw(path, header, data)
        (folder / "config.json").write_text(json.dumps(config))
        for source in (path, folder):
            for what, work in (("load", ss.load), ("inspect", ss.inspect_checkpoint), ("verify", ss.verify_checkpoint)):
                case.call(what, lambda work=work, source=source: work(source))
            case.call(
                "dry run",
                lambda source=source: ss.pack_checkpoint(source, root / "o", ss.Options(prune="magnitude"), dry_run=True),
            )

    read()


# ---- the run -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """With NEW_MEMORY to take at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + NEW_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one(seed: int, number: int) -> str:
    """Run a case; what came of it, or "FINDING" after it has been printed."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    case = Case(f"{seed}/{number}", root)
    try:
        with bounded():
            if number % 50 == 49:
                headers(seed * 1000 + number, 40, root)
                return "headers"
            return case.run()
    except Exception:  # a Finding, or what no call may raise
        print(
            f"\n{traceback.format_exc()}\nfinding: python tests/fuzz.py --seed {seed} --only {number}\n  "
            + "\n  ".join(case.told),
            file=sys.stderr,
        )
        return "FINDING"
    finally:
        shutil.rmtree(root, ignore_errors=True)
        gc.collect()


def fuzz(seed: int, *, seconds: float = 0, count: int = 0, first: int = 0) -> Counter[str]:
    """Run cases for a time, or a number of them: how often what came of it."""
    found: Counter[str] = Counter()
    stop, number = time.monotonic() + seconds, first
    while number < first + count if count else time.monotonic() < stop:
        found[one(seed, number)] += 1
        number += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--count", type=int, default=0, help="cases, instead of seconds")
    parser.add_argument("--seed", type=int, default=None, help="default: of the clock, and printed")
    parser.add_argument("--only", type=int, default=None, help="run one case of the seed")
    given = parser.parse_args()
    seed = int(time.time()) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    one_case = given.only is not None
    found = fuzz(seed, seconds=given.seconds, count=1 if one_case else given.count, first=given.only if one_case else 0)
    print(f"{sum(found.values())} cases: " + ", ".join(f"{number} {what}" for what, number in found.most_common()))
    sys.exit(1 if found["FINDING"] else 0)


if __name__ == "__main__":
    main()
