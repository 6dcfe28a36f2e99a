"""Options and fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile(  # the same examples everywhere, however slow the machine
    "default", deadline=None, max_examples=60, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run the tests that need an NVIDIA GPU, and fail where there is none")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """tests/gpu is not even imported without --gpu, and must be importable with it.

    tests/peers and tests/integrations are not imported where their packages are missing, unless they are named (make
    test-peers, test-integrations): then that is an error.
    """
    engines = all(map(find_spec, ("torch", "transformers")))
    peers = engines and find_spec("compressed_tensors") is not None
    wanted = {"gpu": config.getoption("--gpu"), "peers": peers, "integrations": engines}
    return None if wanted.get(collection_path.name, True) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=gpu)  # not skipped: a skip would claim that they could have run
    items[:] = [item for item in items if item not in set(gpu)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --gpu nothing may be skipped: what did not run did not pass."""
    report = yield
    if report.skipped and item.config.getoption("--gpu"):
        report.outcome = "failed"
    return report


@pytest.fixture(params=["compiled", "python"])
def bodies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the CPU's kernels compiled, then with their bodies as the interpreter sees them."""
    import numpy as np

    from slidesparse_nb.cpu import block_scales, kernels, matmul

    for module in (kernels, block_scales, matmul) if request.param == "python" else ():
        for name, value in list(vars(module).items()):
            if hasattr(value, "py_func"):
                monkeypatch.setattr(module, name, value.py_func)
    with np.errstate(over="ignore", invalid="ignore"):  # NumPy's scalars warn where integers wrap around and at NaN
        yield request.param


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test's own, of compiled kernels, tuned products and outcomes of self-tests."""
    monkeypatch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of a file's own, so that everything is compiled now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIDESPARSE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def unit_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the size of the blocks that checkpoints are converted in."""

    def set_it(size: int) -> None:
        for module in ("run", "rows", "layout", "to_dense", "inspect"):
            monkeypatch.setattr(f"slidesparse_nb.convert.{module}.UNIT_BYTES", size)

    return set_it
