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
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import models
import numpy as np
import safetensors
from faults import contents, failing, killed

import slidesparse_nb as ss
from slidesparse_nb.checkpoint import packed_entries, slidesparse_metadata
from slidesparse_nb.checkpoint.safetensors import SafetensorsFile
from slidesparse_nb.core import reference
from slidesparse_nb.core.dtypes import BFLOAT16, FLOAT8, PACKED, SAFETENSORS_BITS
from slidesparse_nb.errors import LONGEST_MESSAGE

PATTERNS = ("6:8", "2:4", "4:6", "8:10", "14:16", "30:32")
NAMES = (
    "fc", "a", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "lm_head",
    "x.weight", "re:(", "re:.*", "*", "x[0", "", ".", "weight_shape", "fc.weight_packed", "层.ü", "\x1b[31mred\n", "n" * 3000,
    "embed", "experts.0.w1",
)  # fmt: skip
ENDS = (
    ".weight_scale", ".bias", ".weight_shape", ".weight_meta", ".weight_packed", ".weight_zero_point", ".weight_scale_inv", "",
    "s",
)  # fmt: skip
JSON = (
    '{"a": 1e999}', "{", "[]", "null", "", "\ufeff{}", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "<html>",
    '{"a": ' + "9" * 5000 + "}", '{"a":' * 5000, '{"\\u0000": 1}', "version https://git-lfs.github.com/spec/v1\noid",
)  # fmt: skip
VALUES = (
    None, True, 0, -1, 8, 17, 4000, 2**31, 2**63, 2**64, 1e300, "", "x" * 5000, "{}", [4], [0, 0], [2**31, 2**31], [8, 8, 8],
    *SAFETENSORS_BITS,
)  # fmt: skip
CONFIG_KEYS = (
    "vocab_size", "model_type", "quantization_config", "compression_config", "text_config", "tie_word_embeddings", "x",
    "quant_method", "config_groups", "ignore",
)  # fmt: skip
ODD_SHAPES = ([], [2], [1, 8], [3, 16], [4, 32], [0, 0], [0, 2**31 - 1], [2**31 - 1, 0], [2**62, 0], [1] * 40)
SECONDS_A_CALL, NEW_MEMORY = 30, 3 << 30


class Finding(Exception):
    """A rule does not hold."""


class Case:
    """One case: its random numbers, its folder, and what it has done so far."""

    def __init__(self, seed: str, root: Path) -> None:
        self.rng, self.root, self.told = random.Random(seed), root, []
        self.np = np.random.default_rng(self.rng.getrandbits(64))
        self.calm = self.chance(0.5)  # names and numbers that are likely to be packed

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    # ---- files

    def anything(self, depth: int = 3) -> Any:
        """A JSON value."""
        kind, count = self.rng.randrange(4) if depth else 0, self.rng.randrange(4)
        if kind == 1:
            return [self.anything(depth - 1) for _ in range(count)]
        if kind == 2:
            return {self.rng.choice((*CONFIG_KEYS, *NAMES)): self.anything(depth - 1) for _ in range(count)}
        return self.rng.choice(VALUES)

    def weight(self, n: int, k: int) -> np.ndarray:
        w = self.np.standard_normal((n, k)).astype(np.float32)
        if self.chance(0.4) and k:
            w = reference.prune(w, ss.Pattern.of(self.rng.choice(PATTERNS)))
        if self.chance(0.02 if self.calm else 0.15) and w.size:
            w.flat[self.rng.randrange(w.size)] = self.rng.choice([np.nan, np.inf, -0.0, 3e38, 1e-40, 70000.0, 1e-8])
        if self.chance(0.05):
            w[:] = 0
        with np.errstate(all="ignore"):
            return w.astype(self.rng.choice([np.float32, np.float16, BFLOAT16.numpy, BFLOAT16.numpy]))

    def dense(self) -> dict[str, np.ndarray]:
        """Tensors of a made-up model."""
        found: dict[str, np.ndarray] = {}
        eight = self.chance(0.3) and self.rng.choice([np.dtype(np.int8), FLOAT8.numpy])
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
            self.forge(source)
        elif self.chance(0.35):
            self.call("save", lambda: ss.save(source, self.packed()))
        elif self.chance(0.5):
            models.write(source, self.dense(), self.rng.choice([{}, {"format": "pt"}, {"slidesparse": "{}"}, {"x": "\n" * 9}]))
        else:
            parts, source = self.dense(), self.root / "in"
            models.folder(source, parts, shards=min(len(parts), self.rng.choice([1, 1, 2, 3])), config=self.config())
            (source / "pytorch_model.bin").unlink()
        if source.is_file() and self.chance(0.15):
            (self.root / "in").mkdir()
            source = source.rename(self.root / "in" / source.name).parent
            (source / "config.json").write_text(json.dumps(self.config()))
        if source.exists() and self.chance(0.1 if self.calm else 0.4):
            self.damage(source)
        return source

    def config(self) -> dict[str, Any]:
        return {self.rng.choice(CONFIG_KEYS): self.anything()} if self.chance(0.3) else {}

    def forge(self, path: Path) -> None:
        """A file whose sizes agree and whose header nobody would write: any types, shapes, names, metadata and bytes."""
        header: dict[str, Any] = {}
        end, start = 0, b""

        def add(name: str, code: str, shape: Any) -> None:
            nonlocal end
            size = math.prod(shape) * SAFETENSORS_BITS[code] // 8
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end := end + size]}

        if self.chance(0.7):  # a packed module of an odd shape; what it stores as that comes first
            pattern, shape = ss.Pattern(6, 8), self.rng.choice([(0, 2**31 - 1), (0, 2**31 - 1), (2**31 - 1, 0), (0, 0), (1, 8)])
            for entry in reversed(packed_entries("forged", pattern, BFLOAT16, shape)):
                add(*entry)
            header["__metadata__"] = slidesparse_metadata(pattern, self.rng.choice([None, BFLOAT16, BFLOAT16, PACKED[0]]))
            start = struct.pack("<qq", *shape)
        if not start or self.chance(0.4):  # other tensors, which may spoil it
            for name in self.rng.sample(NAMES, self.rng.randrange(1, 5)):
                for tail in (".weight", *self.rng.sample(ENDS, 2)):
                    add(name + tail, self.rng.choice(list(SAFETENSORS_BITS)), self.rng.choice(ODD_SHAPES))
        if self.chance(0.3):
            header[self.rng.choice([*header, "x"])] = self.anything()
        write_raw(path, header, (start + self.np.bytes(end % 2**20))[: end % 2**20])

    def damage(self, source: Path) -> None:
        """Change bytes, length, header entries or JSON of one file of the source."""
        path = self.rng.choice([source] if source.is_file() else sorted(p for p in source.rglob("*") if p.is_file()))
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
        elif kind >= 4 and path.suffix == ".safetensors":
            with contextlib.suppress(ValueError, AttributeError):  # it is forged
                self.edit(path, data)
            return
        elif path.suffix == ".json":
            data[:] = self.rng.choice(
                [*JSON, json.dumps(self.anything()), json.dumps({"weight_map": self.anything()})]
            ).encode()
        path.write_bytes(data)
        if self.chance(0.1) and source.is_dir():
            link, folder = source / "link", source / "model.safetensors.x"
            self.rng.choice([lambda: link.symlink_to("/etc/passwd"), folder.mkdir, path.unlink])()

    def edit(self, path: Path, data: bytearray) -> None:
        """One value of the header replaced, perhaps a name, too."""
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = self.rng.choice([*header, "x"])
        if isinstance(entry := header.get(name), dict) and entry and self.chance(0.8):
            entry[self.rng.choice(list(entry))] = self.anything(1)
        else:
            header[name] = self.anything()
        if self.chance(0.3):
            header[self.rng.choice([name + ".weight_packed", name.replace("weight", "weight_packed"), "fc"])] = header.pop(name)
        write_raw(path, header, data[8 + length :])

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

    def must(self, what: str, work: Callable[[], Any]) -> Any:
        result = self.call(what, work)
        if isinstance(result, BaseException):
            raise Finding(f"{what} is refused: {type(result).__name__}: {result}")
        return result

    def options(self) -> tuple[ss.Options, ss.Run]:
        pick = self.rng.choice
        few = self.calm and self.chance(0.8)
        options = ss.Options(
            pattern=pick(PATTERNS),
            scheme=pick(["auto", "auto", "INT8_W8A8", "FP8_DYNAMIC", "BF16", "FP16"]),
            prune=pick(["magnitude", "magnitude", "random", *["none"][few:]]),
            seed=pick([0, 7]),
            targets=(pick(NAMES),) if self.chance(0.15) and not few else (),
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
        if source.is_file():
            self.misread(source)
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
        made = self.call(f"pack with {options}, {run}", lambda: ss.pack_checkpoint(source, out, options, run))
        if isinstance(made, OSError):
            raise Finding(f"an OSError without a fault: {made}")
        if isinstance(made, BaseException):
            self.same(before, "a refusal")
            return type(made).__name__
        if isinstance(planned, BaseException):
            raise Finding(f"the dry run refused what was packed: {planned}")
        if self.chance(0.25):
            self.faulty(source, out, options, run)
        self.checked(source, out, options, loaded, made)
        self.same(before, "packing", more=out.name)
        return "packed"

    def same(self, before: dict[str, bytes], what: str, more: str = "") -> None:
        now = {name: data for name, data in contents(self.root).items() if not more or name.split("/")[0] != more}
        if now != before:
            names = sorted(name for name in now.keys() | before if now.get(name) != before.get(name))
            raise Finding(f"{what} changed or left {names[:5]}")

    def unpacked(self, source: Path, loaded: dict[str, Any]) -> None:
        """Unpack a verified checkpoint; every module equals what `reference` unpacks."""
        out = self.root / ("u.safetensors" if source.is_file() else "u")
        if not isinstance(self.call("unpack", lambda: ss.unpack_checkpoint(source, out)), BaseException):
            dense = self.must("load of the unpacked", lambda: ss.load(out))
            for name, value in loaded.items():
                if not isinstance(value, ss.PackedWeight):
                    equal(f"unpacked {name!r}", dense[name], value)
                elif max(value.n, value.k) < 2**22:  # `reference` works in memory for a whole row
                    equal(f"unpacked {name!r}", dense[f"{name}.weight"], reference.unpack(value))
            remove(out)

    def checked(self, source: Path, out: Path, options: ss.Options, loaded: Any, report: ss.Report) -> None:
        """The output verifies, loads, equals what `reference` makes of the source, and is complete for --resume."""
        if options.format == "packed":
            self.must("verify of the output", lambda: ss.verify_checkpoint(out))
            self.must("verify against the source", lambda: ss.verify_checkpoint(out, source))
        again = self.must("resume of a complete output", lambda: ss.pack_checkpoint(source, out, options, ss.Run(resume=True)))
        if not again.already_complete or not again.verified:
            raise Finding("a complete output is not found complete")
        if not isinstance(loaded, ss.UnsupportedError):  # else a tensor that goes through is of a type that NumPy lacks
            self.must("load of the output", lambda: ss.load(out))
            models.assert_made(out, source, report)

    def misread(self, source: Path) -> None:
        """Damaged copies of a file: refused, or read as the reader of the safetensors package does, which is less strict."""
        path = self.root / "damaged.safetensors"
        for _ in range(5):
            path.write_bytes(source.read_bytes())
            self.damage(path)
            found = self.call("read of a damaged file", lambda: SafetensorsFile(path))
            loaded = self.call("load of a damaged file", lambda: ss.load(path))
            if isinstance(found, SafetensorsFile):
                tensors = {name: (t.code, [*t.shape], found.raw(name).tobytes()) for name, t in found.tensors.items()}
                theirs = safetensors.deserialize(path.read_bytes())
                if tensors != {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in theirs}:
                    raise Finding("another reader sees other tensors")
                for name, value in loaded.items() if isinstance(loaded, dict) else ():
                    if isinstance(value, ss.PackedWeight):
                        value.validate()
                    elif value.tobytes() != tensors[name][2]:
                        raise Finding(f"{name!r} is loaded as something else")
        path.unlink()

    def faulty(self, source: Path, out: Path, options: ss.Options, run: ss.Run) -> None:
        """Pack once more with a fault at some system call, then resume without; equal to the run without faults."""
        wanted = contents(out)
        remove(out)
        at, kind = self.rng.randrange(1, 60), self.rng.choice(["ENOSPC", "EIO", "full", "kill", "kill torn"])
        what = f"pack with {options}, {run}, {kind} at change {at}"
        if kind.startswith("kill"):
            self.told.append(what)
            killed(lambda: ss.pack_checkpoint(source, out, options, run), at, torn="torn" in kind)
        else:
            with failing(at, errno.EIO if kind == "EIO" else errno.ENOSPC, lasting=kind == "full"):
                failed = self.call(what, lambda: ss.pack_checkpoint(source, out, options, run))
            if isinstance(failed, ss.SlideSparseError):
                raise Finding(f"{what}: {type(failed).__name__}: {failed}")
            if isinstance(failed, OSError) and not failed.filename:
                raise Finding(f"{what}: names no file: {failed}")
        self.must("resume", lambda: ss.pack_checkpoint(source, out, options, ss.Run(resume=True, verify=run.verify)))
        if contents(out) != wanted:
            raise Finding(f"{what}: the resumed output differs")


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def equal(what: str, found: Any, wanted: Any) -> None:
    facts = [None if a is None else (a.dtype, a.shape, a.tobytes()) for a in (found, wanted)]
    if facts[0] != facts[1]:
        raise Finding(f"{what} is not what it should be")


# ---- the run -----------------------------------------------------------------------------------------------------


def one(seed: int, number: int) -> str:
    """Run a case with NEW_MEMORY to take at most; what came of it, or "FINDING" after it has been printed."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    case = Case(f"{seed}/{number}", root)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + NEW_MEMORY, hard))
    try:
        return case.run()
    except Exception:  # a Finding, or what no call may raise
        again = f"finding: python tests/fuzz.py --seed {seed} --only {number}"
        print(f"\n{traceback.format_exc()}", again, *case.told, sep="\n  ", file=sys.stderr)
        return "FINDING"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
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
    parser.add_argument("--seed", type=int, default=int(time.time()), help="default: of the clock, and printed")
    parser.add_argument("--only", type=int, default=None, help="run one case of the seed")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    count = given.count if given.only is None else 1
    found = fuzz(given.seed, seconds=given.seconds, count=count, first=given.only or 0)
    print(f"{sum(found.values())} cases: " + ", ".join(f"{number} {what}" for what, number in found.most_common()))
    sys.exit(1 if found["FINDING"] else 0)


if __name__ == "__main__":
    main()
