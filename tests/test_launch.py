"""The launcher: what the driver is handed, byte for byte, by a function that stands for cuLaunchKernelEx; no GPU needed."""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from slidesparse_nb.cuda import launch
from slidesparse_nb.cuda.launch import Launcher, LaunchError
from slidesparse_nb.errors import UnsupportedError


class Value(ctypes.Union):
    """CUlaunchAttributeValue, of CUDA 13's cuda.h, as far as it is used."""

    _fields_ = (
        ("pad", ctypes.c_char * 64),
        ("programmatic_stream_serialization_allowed", ctypes.c_int),
        ("event", ctypes.c_void_p),
    )


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", Value))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
ARGUMENTS = ctypes.POINTER(ctypes.POINTER(ctypes.c_int64))


class Driver:
    """Notes what it is asked to launch; gives the statuses it was told to, then 0."""

    def __init__(self, parameters: int, statuses: tuple[int, ...] = ()) -> None:
        self.seen: list[dict[str, Any]] = []
        self.parameters, self.statuses = parameters, list(statuses)
        self.function = LAUNCH(self._launch)

    def _launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
        c, pointers = Config.from_address(config), ctypes.cast(parameters, ARGUMENTS)
        attributes = [(a.id, a.value.programmatic_stream_serialization_allowed) for a in c.attributes[: c.attribute_count]]
        self.seen.append(
            {
                "grid": (c.gx, c.gy, c.gz),
                "block": (c.bx, c.by, c.bz),
                "shared": c.shared,
                "stream": c.stream or 0,
                "attributes": attributes,
                "function": function,
                "arguments": tuple(pointers[i].contents.value for i in range(self.parameters)),
                "extra": extra,
            }
        )
        return self.statuses.pop(0) if self.statuses else 0


def launcher(driver: Driver, types: list[str] | None = None) -> Launcher:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_driver", lambda: SimpleNamespace(cuLaunchKernelEx=driver.function))
        return Launcher(SimpleNamespace(ptr=0x7F00_1234_5678), types or ["integer"] * driver.parameters)


def test_structures_are_as_large_as_the_drivers() -> None:
    assert ctypes.sizeof(Config) == launch.CONFIG_BYTES == 56
    assert ctypes.sizeof(Attribute) == struct.calcsize(launch.ATTRIBUTE) == 72


@pytest.mark.parametrize("programmatic", [False, True])
@pytest.mark.parametrize("parameters", [1, 14, launch.MOST_PARAMETERS])
def test_what_the_driver_sees(parameters: int, programmatic: bool) -> None:
    driver = Driver(parameters)
    arguments = tuple((-1) ** i * (2**62 + i) for i in range(parameters))
    launcher(driver)((2**31 - 1, 65535, 3), (128, 2, 1), 232448, 0x7FFF_0000_8888, programmatic, *arguments)
    assert driver.seen == [
        {
            "grid": (2**31 - 1, 65535, 3),
            "block": (128, 2, 1),
            "shared": 232448,
            "stream": 0x7FFF_0000_8888,
            "attributes": [(6, 1)] if programmatic else [],
            "function": 0x7F00_1234_5678,
            "arguments": arguments,
            "extra": None,
        }
    ]


def test_an_address_may_have_its_highest_bit_set() -> None:
    driver = Driver(2)
    launcher(driver, ["address", "integer"])((1, 1, 1), (32, 1, 1), 0, 0, False, 2**64 - 2, -3)
    assert driver.seen[0]["arguments"] == (-2, -3)


def test_a_slot_is_used_again_and_keeps_nothing() -> None:
    driver = Driver(2)
    run = launcher(driver)
    for i in range(50):
        run((i + 1, 1, 1), (32, 1, 1), i, i, i % 2 == 0, i, -i)
    assert [(s["grid"][0], s["shared"], len(s["attributes"]), s["arguments"]) for s in driver.seen] == [
        (i + 1, i, int(i % 2 == 0), (i, -i)) for i in range(50)
    ]
    assert len(launch._free) <= 2


def test_threads_and_finalizers_never_share_a_slot() -> None:
    """A launch that is made while another is under way, from another thread or from the same one, leaves it alone."""
    inner = Driver(3)
    run_inside = launcher(inner)

    class Nested(Driver):
        def _launch(self, config: int, function: int, parameters: int, extra: int | None) -> int:
            run_inside((9, 9, 9), (9, 9, 9), 9, 9, True, 9, 9, 9)
            return super()._launch(config, function, parameters, extra)

    outer = Nested(3)
    run = launcher(outer)

    def work(thread: int) -> None:
        for i in range(200):
            run((thread + 1, 1, 1), (32, 1, 1), 0, thread, False, thread, i, thread * i)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    seen = sorted((s["stream"], s["arguments"][1], s["grid"], s["arguments"]) for s in outer.seen)
    assert seen == [(t, i, (t + 1, 1, 1), (t, i, t * i)) for t in range(4) for i in range(200)]
    assert {s["arguments"] for s in inner.seen} == {(9, 9, 9)}


def test_the_number_of_arguments_is_checked() -> None:
    driver = Driver(3)
    with pytest.raises(struct.error):
        launcher(driver)((1, 1, 1), (1, 1, 1), 0, 0, False, 1, 2)
    assert not driver.seen


def test_a_refusal_is_one_sentence_with_the_drivers_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"cuGetErrorName": b"CUDA_ERROR_INVALID_VALUE", "cuGetErrorString": b"invalid argument"}

    def named(name: str) -> Any:
        def function(status: Any, text: Any) -> int:
            assert status.value == 1
            text._obj.value = texts[name]
            return 0

        return function

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(**{name: named(name) for name in texts}))
    driver = Driver(1, (1,))
    words = (
        r"launch: \(0, 1, 1\) blocks of \(32, 1, 1\) threads, 16 bytes shared:"
        r" CUDA_ERROR_INVALID_VALUE \(1\), invalid argument"
    )
    with pytest.raises(LaunchError, match=words):
        launcher(driver)((0, 1, 1), (32, 1, 1), 16, 0, False, 5)


def test_a_thread_without_a_context_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = []
    runtime = SimpleNamespace(free=freed.append)
    monkeypatch.setattr(launch.importlib, "import_module", lambda name: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    driver = Driver(1, (launch.INVALID_CONTEXT,))
    launcher(driver)((1, 1, 1), (32, 1, 1), 0, 0, False, 5)
    assert freed == [0]
    assert len(driver.seen) == 2
    assert driver.seen[0] == driver.seen[1]


@pytest.mark.parametrize(("libraries", "said"), [
    ({}, r"this machine has no NVIDIA driver \(libcuda.so.1\)"),
    ({"libcuda.so.1": object()}, "driver: libcuda.so.1 has no cuLaunchKernelEx; install a driver of CUDA 12 or later"),
])  # fmt: skip
def test_no_driver(libraries: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return libraries[name]

    launch._driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(UnsupportedError, match=said):
        launch.explain(1)
