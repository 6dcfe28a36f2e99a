"""The parts of slidesparse bench: the clock on simulated time, checks, the plan, floors, and what is shown of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bench_device import Device, FakeGpu, stand_in

import slidesparse_nb as ss
from slidesparse_nb.tuning.clock import CACHES, MOST_CALLS, poison
from tools.arguments import token_range
from tools.benchmark import check, gpu, show
from tools.benchmark.cases import ALL, KINDS, MODELS, OURS, Linear, copies, in_turn, is_curve, plan
from tools.benchmark.peers import FULL, QUICK
from tools.benchmark.results import CEILINGS, Cell, Results, rows, work
from tools.documents import rewrite

# ---- clock -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("us", [3.0, 100.0, 50_000.0])
def test_bursts_time_the_device_alone(monkeypatch: pytest.MonkeyPatch, us: float) -> None:
    """Launches that are queued behind others cost the device's time, not the host's; before each burst it idles."""
    device = Device(lambda at, calls: us)
    made = stand_in(monkeypatch, device)
    found = made.bursts(made.capture([lambda: None]))
    assert found == pytest.approx([max(us, 5.0)] * 5, rel=0.001)  # the host needs 5 us to queue one
    gaps = np.diff(device.starts)
    assert (gaps[gaps > us + 100] >= 20_000).sum() == (gaps > us + 100).sum() == 5


def test_sustained_load_tells_the_second_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """After 0.45 s the clock falls, and only that is told; the device never waits for the host."""
    device = Device(lambda at, calls: 100.0 if at < 0.45e6 else 130.0)
    made = stand_in(monkeypatch, device)
    found, seen = made.sustained(made.capture([lambda: None]))
    assert found == pytest.approx([130.0] * len(found))
    assert 0.45 < sum(found) * 200 * 1e-6 < 0.6  # 200 launches a piece of about 20 ms
    assert np.diff(device.starts[2:]).max() < 131
    assert seen == {"sm_mhz": 1500, "celsius": 60, "watts": 700}
    long = stand_in(monkeypatch, Device(lambda at, calls: 300_000.0))
    assert len(long.sustained(long.capture([lambda: None]))[0]) >= 2  # launches longer than a piece


def test_capture_runs_then_records_and_recovers() -> None:
    device = Device()
    made, log = FakeGpu(device), list[str]()
    gpu.Gpu.capture(made, [lambda: log.append("captured" if device.capturing else "run")] * 2)()
    assert log == ["run", "run", "captured", "captured"]
    assert len(device.starts) == 1

    def fails() -> None:
        if device.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        gpu.Gpu.capture(made, [fails])
    assert not device.capturing


def test_operands() -> None:
    made = FakeGpu(Device())
    for dtype in ("bfloat16", "float16"):
        assert made.normal(3, 5, dtype).dtype == np.dtype(dtype)
        y = made.empty(6, 7, dtype)
        poison(y)
        assert np.isnan(y.astype(np.float32)).all()
        assert made.unwritten(y) == 42
        y[...] = np.arange(42, dtype=y.dtype).reshape(6, 7)
        assert made.unwritten(y) == 0
        np.testing.assert_array_equal(made.host(y, [0, 5], [1, 6]), y[[0, 5]][:, [1, 6]])


def test_power_is_the_energys_slope_if_it_moved() -> None:
    """500 W, told every 100 ms, looked at every 20 ms: the parts before the first and after the last change say nothing."""
    samples = [{"at": t, "watts": 100.0, "joules": 50.0 * int(t / 0.1 + 1e-9)} for t in np.arange(0, 0.5, 0.02)]
    assert gpu.means(samples)["watts"] == pytest.approx(500)
    assert gpu.means(samples[:8]) == {"sm_mhz": None, "celsius": None, "watts": 100}  # one change
    assert gpu.means([]) == {"sm_mhz": None, "celsius": None, "watts": None}


# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.key)
def test_right_products_pass_and_wrong_ones_do_not(kind) -> None:
    rng = np.random.default_rng(4)
    packed = ss.pack(rng.standard_normal((40, 2048)).astype(np.float32), "6:8", kind.name, prune="magnitude")
    x = rng.standard_normal((9, 2048)).astype(np.dtype(kind.activations))
    y = ss.matmul(x, packed)
    check.check_product(y, x, packed)
    # of a stage of 128 expanded columns left out, every element is within its bound at long k, but the whole is not
    part = x.copy()
    part[:, :86] = 0
    for wrong in (ss.matmul(x, packed) * y.dtype.type(1.0625), ss.matmul(part, packed), np.roll(y, 1, axis=0)):
        with pytest.raises(ss.VerificationError):
            check.check_product(wrong, x, packed)
    y[3, 5] = np.nan
    with pytest.raises(ss.VerificationError, match="not finite"):
        check.check_product(y, x, packed)


def test_packed_weights_and_tokens_are_compared_byte_for_byte() -> None:
    w = np.random.default_rng(5).standard_normal((6, 64)).astype(np.float32)
    for dtype in ("int8", "float16"):
        packed = ss.pack(w, "6:8", dtype, prune="magnitude")
        check.check_packed(packed, w)
        q = ss.quantize(w, packed)
        check.check_equal("tokens", (q.values, q.scale), check.quantized(w, packed))
        with pytest.raises(ss.VerificationError, match="tokens differ from the reference's"):
            check.check_equal("tokens", (q.values, q.scale), check.quantized(w * np.float32([1.01] + [1] * 63), packed))
        packed.meta[2, 3] ^= 0x40 if packed.meta[2, 3] != 0x44 else 0x80
        with pytest.raises(ss.VerificationError, match="packed weights differ"):
            check.check_packed(packed, w)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 100_000])
def test_samples_hold_both_ends(count: int) -> None:
    found = check.sample(count, 16, np.random.default_rng(6))
    assert (found[0], found[-1], len({*found})) == (0, count - 1, min(count, 16))


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_the_plan_says_the_most_first() -> None:
    assert [(x.n, x.k) for x in MODELS["qwen2.5-7b"].linears] == [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
    cases = plan(FULL)
    assert len(set(cases)) == len(cases)
    first_other = next(i for i, case in enumerate(cases) if case.pattern not in (None, "6:8"))
    assert all(case.pattern != "6:8" for case in cases[first_other:])
    names = ["qwen2.5-7b gemm FP8 m=1 burst dense", "qwen2.5-7b gemm FP8 6:8 m=1 burst ours"]
    assert [str(case) for case in cases[:2]] == names
    dense = [case for case in cases if case.provider == "dense"]
    assert len(dense) == len(KINDS) * (len(FULL.tokens) + len(FULL.sustained))  # once, whatever the patterns
    assert {case.kind.key for case in cases if case.provider == "torch"} == {"fp8", "int8"}
    assert len(plan(QUICK)) == 2 * 3 * 3


@pytest.mark.parametrize("count", [1, 12, 13, 70, 300])
def test_a_curve_is_measured_coarsely_first(count: int) -> None:
    tokens = [3 * i + 1 for i in range(count)][::-1]
    order = in_turn(tokens)
    assert sorted(order) == sorted(tokens)
    assert is_curve(tokens) or order == tokens
    for half in (count // 4, count // 2) if is_curve(tokens) else ():  # no gap is much wider than it must be
        places = sorted((m - 1) // 3 for m in order[:half])
        assert max(np.diff(places)) <= 2 * 2 * count / half
    assert [*token_range("64-1024:320"), *token_range("1 - 2"), *token_range("7")] == [64, 384, 704, 1024, 1, 2, 7]


def test_graphs_are_cold_for_every_provider() -> None:
    cache = 60 << 20
    for linear in MODELS["qwen2.5-7b"].linears:
        for kind in KINDS.values():
            count = copies([linear], kind, 1, cache)
            assert count == MOST_CALLS or count * linear.n * linear.k * kind.size // 2 >= 0.99 * CACHES * cache
    assert copies(MODELS["qwen2.5-7b"].linears, KINDS["bf16"], 16384, cache) == 1


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.key)
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "8:10"])
def test_work(kind, pattern) -> None:
    w = np.random.default_rng(1).standard_normal((24, 130)).astype(np.float32)
    packed = ss.pack(w, pattern, kind.name, prune="magnitude")
    assert work("pack", kind, pattern, 0, 24, 130) == (0, 0, 24 * 130 * 2 + packed.nbytes)
    x = 16 * (130 * kind.size + 4 * kind.quantized)
    flops, slid, moved = work("gemm", kind, pattern, 16, 24, 130)
    assert (flops, slid, moved) == (2 * 16 * 24 * 130, 2 * 16 * 24 * packed.ks, packed.nbytes + x + 16 * 24 * 2)
    assert work("linear", kind, pattern, 16, 24, 130)[2] == packed.nbytes + 16 * 130 * 2 + 16 * 24 * 2
    assert work("quantize", kind, pattern, 16, 24, 130)[2] == 16 * 130 * 2 + x


def made_up(us: dict[int, float], kinds: tuple[str, ...] = ("fp8",), gpu: str = "Imaginary GPU") -> Results:
    """Two layers: a takes `us`, by m, b as long as the last of them; dense takes 12 us, cuSPARSELt twice as long as ours."""
    layers = [Linear("a", 64, 256), Linear("b", 128, 256)]
    found = Results("2000-01-01", {"gpu": gpu}, {}, {"model": layers}, bandwidth={"copy": 1e12}, complete=True)
    for kind in kinds:
        for m in us:
            for layer in layers:
                ours = us[m] if layer.name == "a" else [*us.values()][-1]
                for provider, pattern, time in ((OURS, "6:8", ours), ("dense", None, 12.0), ("cusparselt", "6:8", 2 * ours)):
                    found.add(Cell(provider, "gemm", "model", layer.name, kind, pattern, m, "burst", time, 0.01 * layer.n))
    return found


def test_rows_add_layers_up_and_know_the_floor() -> None:
    results = made_up({16: 10.0, 1 << 20: 10.0}, gpu="NVIDIA H200")
    few, many = rows(results)
    assert (few.cell.layer, few.cell.us, few.peers) == (ALL, 20, {"dense": 24, "cuSPARSELt": 40})
    assert few.over("dense") == pytest.approx(1.2)
    assert few.cell.spread == pytest.approx(1.28)  # the larger of the layers'
    works = [work("gemm", KINDS["fp8"], "6:8", m, n, 256) for m in (16, 1 << 20) for n in (64, 128)]
    assert few.floor == pytest.approx(sum(moved for _, _, moved in works[:2]) / 1e6)  # bytes
    slid = sum(slid for _, slid, _ in works[2:]) / CEILINGS["NVIDIA H200"]["fp8"]["burst"] * 1e6
    assert many.floor == pytest.approx(max(slid, sum(moved for _, _, moved in works[2:]) / 1e6))
    assert [row.cell.layer for row in rows(results, each=True)] == ["a", "b", ALL] * 2
    results.add(Cell(OURS, "gemm", "model", "b", "fp8", "6:8", 16, "burst", blank="wrong: by far", wrong=True))
    results.add(Cell(OURS, "linear", "model", "a", "fp8", "6:8", 16, "burst", 30))
    results.add(Cell("torch", "linear", "model", "a", "fp8", None, 16, "burst", 60))
    few, _, linear = rows(results)
    assert (few.cell.us, few.cell.blank, few.cell.spread) == (None, "wrong: by far", None)
    assert (linear.cell.us, [row.over("PyTorch") for row in rows(results, each=True)][-2]) == (
        None,
        2,
    )  # stopped before layer b
    assert list(show.blanks(results)) == ["1 blank of ours (this library): wrong: by far"]
    _, columns, lines = next(show.tables(results))
    assert lines[0][columns.index("us")] == "wrong"


def test_tables_leave_out_what_is_empty_or_always_the_same() -> None:
    title, columns, lines = next(show.tables(made_up({16: 10.0, 4096: 14.0})))
    assert title == "gemm, burst, model, sum of the layers, FP8, 6:8"
    assert columns[:6] == ["m", "us", "+-", "dense us", "x dense", "cuSPARSELt us"]
    assert [line[:5] for line in lines] == [["16", "24.0", "128%", "24.0", "1.00x"], ["4096", "28.0", "128%", "24.0", "0.86x"]]
    curve = made_up({m: 10.0 + m for m in in_turn(range(1, 61))}, ("int8", "bf16"))
    title, columns, lines = next(show.tables(curve))
    assert f"{show.CURVE_ROWS} of 60 m, -v shows all" in title
    tokens = [int(line[columns.index("m")]) for line in lines if line[0] == "INT8"]
    assert (len(tokens), tokens[0], tokens[-1], tokens) == (show.CURVE_ROWS, 1, 60, sorted(tokens))
    assert len(next(show.tables(curve, each=True))[2]) == 2 * 3 * 60


@pytest.mark.parametrize(
    ("ratios", "text"),
    [
        ({1: 1.2, 64: 1.1, 4096: 1.3, 8192: 1.3}, "faster than dense at every m measured, 1 to 8192"),
        ({1: 0.9, 64: 1.1, 4096: 1.3}, "faster than dense at m = 64, 4096; slower at m = 1 (0.90x)"),
        ({1: 0.5, 64: 1.0}, "slower than dense at every m measured: m = 1 (0.50x), 64 (1.00x)"),
        ({1: 0.9, 2: 0.85, 3: 0.91, 4: 0.8, 8: 1.2, 12: 0.999},
         "faster than dense at m = 8; slower at m = 1 to 4 (0.80x to 0.91x), 12 (0.999x)"),
        (dict.fromkeys(range(1, 8), 0.9), "slower than dense at every m measured: m = 1 to 7 (0.90x)"),
    ],
)  # fmt: skip
def test_compared(ratios: dict[int, float], text: str) -> None:
    assert show.compared("dense", ratios) == text


def test_what_takes_longer_than_more_tokens_is_named() -> None:
    assert show.slow({}) == show.slow({1: 10.0, 2: 10.9, 4: 10.0, 8: 30.0}) == {}
    assert show.slow({1: 20.0, 2: 12.0, 4: 11.0, 8: 10.0, 16: 10.5}) == {1: (2.0, 8), 2: (1.2, 8)}
    times = {**dict.fromkeys(range(1, 6), 15.0), 3: 18.0, 6: 10.0, 8: 14.0, 9: 12.0}
    sentence = "over 1.1 times as long as with more tokens at m = 1 to 5 (up to 1.80x m = 6), 8 (1.17x m = 9)."
    assert list(show.cliffs(made_up(times))) == [f"FP8 6:8 product, model a: {sentence}"]


def test_readme_section() -> None:
    results = made_up({16: 10.0, 4096: 14.0})
    results.add(Cell("dense", "gemm", "model", "a", "int8", None, 16, "burst", 9, rows=32))
    results.complete = False
    text = show.section(results)
    for line in ("| m | 16 | 4096 |", "| FP8 | 24.0 | 28.0 |", "**Times as fast as dense cuBLASLt**:", "| FP8 | 1.00 | 0.86 |"):
        assert f"{line}\n" in text
    assert "time budget; everything shown was measured." in text
    assert "more tokens than m, since they take no fewer: dense INT8 32 at m = 16." in text


def test_a_section_of_a_document_is_replaced(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<begin>\nold\n<end>\nafter\n")
    assert rewrite(page, "<begin>", "<end>", "new\n")
    assert page.read_text() == "before\n<begin>\n\nnew\n\n<end>\nafter\n"
    assert not rewrite(page, "<begin>", "<end>", "new\n")
    for text in ("no lines", "<begin> <begin> <end>", "<end> <begin>"):
        page.write_text(text)
        with pytest.raises(ss.FormatError, match="must hold the lines"):
            rewrite(page, "<begin>", "<end>", "new")


def test_a_picture_needs_a_dense_baseline(tmp_path: Path) -> None:
    from tools.benchmark import picture

    results = made_up({m: 10.0 for m in range(1, 30)}, ("int8", "bf16"))
    picture.draw(results, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    results.cells = {key: cell for key, cell in results.cells.items() if cell.provider != "dense"}
    with pytest.raises(ss.FormatError, match="no product with a dense baseline"):
        picture.draw(results, tmp_path / "b.png")
