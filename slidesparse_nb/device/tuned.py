"""Every way to compute a product, and the one that `slidesparse tune` found to be the fastest on a GPU (docs/tuning.md).

    <cache>/tuned/NVIDIA-H200-132-sm90-gemm-<hash of the kernel's source>/16x4608x3584-6of8-int8-bfloat16.json

One file a product, written beside its place and renamed: processes that tune at the same time need no lock, and the last one
to write a product is right. A file says in words what its launches are. They are looked up among the ways that there are, so
a file that is broken, of another release or of another kernel can be ignored, but can never launch what was not made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from .. import env
from ..arch import Config, choose, sm80, sm90
from ..dtypes import DType
from ..errors import FormatError, UnsupportedError
from ..pattern import Pattern
from ..strict_json import parse_json
from . import jit

Way = tuple[Config, ...]
"""The launches that compute a product."""

WITHIN = 1.5
"""Ways that are estimated to take up to so many times as long as the cheapest are worth timing,"""

MOST_WAYS = 40
"""and of these so many, the cheapest."""


@dataclass(frozen=True)
class Product:
    """y [m, n] = x [m, k] @ w.T on one kind of GPU.

    Attributes:
        k, pattern: `as_multiplied`.
        family: whose kernel computes it.
        sms, gpu: multiprocessors and name of the device.
    """

    m: int
    n: int
    k: int
    pattern: Pattern
    dtype: DType
    out: str
    family: ModuleType
    capability: tuple[int, int]
    sms: int
    gpu: str

    def best(self) -> Way:
        """The way that was found for this very m, or else the cheapest."""
        return (env.tuned() and found(self)) or self.cheapest()

    def cheapest(self) -> Way:
        """The model's choice."""
        m, n, k = self.m, self.n, self.k
        return choose(self.family, m, n, k, self.pattern, self.dtype, self.out, self.capability, self.sms)

    def ways(self) -> Iterator[tuple[float, Way]]:
        """Every way that the choice is made of, and its estimated cost."""
        if self.family is sm90:
            problem = sm90.Problem.of(self.m, self.n, self.k, self.pattern, self.dtype, self.out, self.sms)
            for tile in sm90.TILES:
                for way in sm90.options(tile, problem):
                    yield sm90.cost(way, problem), way
            return
        m, n, k = self.m, self.n, self.k
        for config in sm80.options(m, n, k, self.pattern, self.dtype, self.out, self.capability, self.sms):
            yield sm80.cost(config, m, n, k, self.capability, self.sms), (config,)

    def likely(self) -> list[Way]:
        """The ways that are worth timing, the model's choice first."""
        ranked = sorted(self.ways(), key=lambda of: of[0])
        near = dict.fromkeys([self.cheapest(), *(way for cost, way in ranked if cost <= WITHIN * ranked[0][0])])
        return list(near)[:MOST_WAYS]

    def file(self) -> Path:
        """Where the way that was found for it stands, or would."""
        kernel = f"{self.family.KERNEL.removesuffix('.cu')}-{jit.source_hash(self.family.KERNEL)}"
        device = re.sub(r"[^A-Za-z0-9]+", "-", f"{self.gpu}-{self.sms}-{kernel}")
        pattern = str(self.pattern).replace(":", "of")
        return folder() / device / f"{self.m}x{self.n}x{self.k}-{pattern}-{self.dtype}-{self.out}.json"


def folder() -> Path:
    """Of all results, for every GPU."""
    return env.cache_dir() / "tuned"


def described(config: Config) -> str:
    """Everything that makes one launch differ from another; nothing that was fitted."""
    values: dict[str, object] = dict(config.defines())
    if isinstance(config, sm90.Config):
        (first, last), begin, end = config.strips, config.begin, config.end
        values |= {
            "strips": f"{first}-{last}", "tiles": f"{begin}-{end}", "band": config.band, "blocks": config.blocks,
            "order": config.order,
        }  # fmt: skip
    else:
        values["splits"] = config.splits
    return " ".join(f"{name}={value}" for name, value in values.items())


@lru_cache(maxsize=4096)
def found(product: Product) -> Way | None:
    """The way that was found for a product; None if there is none, or none that this release has. Read once a process."""
    try:
        if not folder().is_dir():
            return None
        launches = parse_json(product.file().read_bytes(), "tuned").get("launches")
    except (OSError, FormatError):
        return None
    return next((way for _, way in product.ways() if [*map(described, way)] == launches), None)


def keep(product: Product, way: Way, told: Mapping[str, object]) -> None:
    """Write down the way that was found, and what else a reader may want to be told.

    Raises:
        UnsupportedError: the cache folder cannot be written.
    """
    file = product.file()
    text = json.dumps({"launches": [*map(described, way)], **told}, indent=1) + "\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        number, beside = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        try:
            with os.fdopen(number, "w") as stream:
                stream.write(text)
            os.replace(beside, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise
    except OSError as error:
        raise UnsupportedError(
            f"cache: {file.parent} cannot be written ({error}); set SLIDESPARSE_CACHE_DIR to a folder that can"
        ) from None
    found.cache_clear()


def drop(product: Product) -> None:
    """Forget what was found for a product."""
    with contextlib.suppress(OSError):
        product.file().unlink()
    found.cache_clear()


def forget() -> int:
    """Forget what was found for every product, on every GPU; return how many results there were."""
    count = len(list(folder().glob("*/*.json")))
    shutil.rmtree(folder(), ignore_errors=True)
    found.cache_clear()
    return count
