"""The arithmetic behind the tables of slidesparse bench, and what is made of a file of results: floors, crossovers, README."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from bench_device import call

import slidesparse_nb as ss
from tools.arguments import token_range
from tools.benchmark import check, readme
from tools.benchmark.figures import figures
from tools.benchmark.floors import CEILINGS, floor_us, packed_bytes, work
from tools.benchmark.results import Cell, Results, load
from tools.benchmark.selection import (
    ALL,
    FEW_TOKENS,
    FULL,
    KINDS,
    MODELS,
    PEERS,
    QUICK,
    Group,
    Linear,
    Preset,
    Selection,
    in_turn,
    is_curve,
    plan,
)
from tools.benchmark.sensors import Sample, means
from tools.benchmark.summary import (
    Cliff,
    cliffs,
    cliffs_named,
    crossover,
    crossover_sentence,
    median,
    percentile,
    slope,
    spread,
)
from tools.benchmark.table import CURVE_ROWS, blanks, crossovers, number, sections
from tools.benchmark.table import cliffs as cliff_sentences
from tools.benchmark.trial import CACHES, MOST_CALLS, copies

ROOT = Path(__file__).resolve().parents[1]


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_percentiles_are_numpys() -> None:
    values = list(np.random.default_rng(0).uniform(0, 100, 17))
    for share in (0, 0.1, 0.5, 0.77, 1):
        assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))
    assert median([3, 1]) == 2
    assert median([5]) == 5


def test_spread() -> None:
    assert spread([10.0] * 5) == 0
    assert spread([9, 10, 10, 10, 11]) == pytest.approx((10.6 - 9.4) / 10)
    assert spread([0.0, 0.0]) == 0


def test_slope_of_a_counter_that_is_refreshed_now_and_then() -> None:
    """500 W, told every 100 ms, looked at every 20 ms: the parts before the first and after the last change say nothing."""
    points = [(t, 500 * 0.1 * int(t / 0.1 + 1e-9)) for t in np.arange(0, 0.5, 0.02)]
    assert slope(points) == pytest.approx(500)
    assert slope(points[:8]) is None  # one change
    assert slope([]) is None


def test_power_is_the_energys_slope_if_it_moved() -> None:
    moving = [Sample(t, 1500, 60, 100, 700 * t) for t in (0.0, 0.1, 0.2, 0.3)]
    assert means(moving).watts == pytest.approx(700)
    assert means([Sample(t, 1500, None, 100, None) for t in (0.0, 0.1)]).watts == 100
    nothing = means([Sample(0, None, None, None, None)])
    assert (nothing.sm_mhz, nothing.celsius, nothing.watts) == (None, None, None)


@pytest.mark.parametrize(
    ("ratios", "first", "says"),
    [
        ({1: 1.2, 64: 1.1, 4096: 1.3}, 1, "faster than dense at every m measured, 1 to 4096."),
        ({1: 0.9, 64: 1.1, 4096: 1.3}, 64, "faster than dense from m = 64 on; slower at m = 1 (0.90x)."),
        ({1: 1.2, 64: 0.9, 256: 1.1}, 256, "faster than dense only at m = 1, 256; slower at m = 64 (0.90x)."),
        ({1: 0.5, 64: 1.0}, None, "slower than dense at every m measured: m = 1 (0.50x), 64 (1.00x)."),
        (
            {1: 1.5, 64: 0.9},
            None,
            "faster than dense only at m = 1; slower at m = 64 (0.90x).",
        ),
        (
            {1: 0.9, 2: 0.85, 3: 0.91, 4: 0.8, 8: 1.2, 9: 1.2, 10: 1.1, 11: 1.1, 12: 0.97, 13: 0.97},
            None,
            "faster than dense only at m = 8 to 11; slower at m = 1 to 4 (0.80x to 0.91x), 12 (0.97x), 13 (0.97x).",
        ),
        (dict.fromkeys(range(8), 0.9), None, "slower than dense at every m measured: m = 0 to 7 (0.90x)."),
        ({16: 1.5}, 16, "faster than dense at m = 16 (1.50x), the only m measured."),
        ({16: 0.5}, None, "slower than dense at m = 16 (0.50x), the only m measured."),
    ],
)
def test_crossover(ratios: dict[int, float], first: int | None, says: str) -> None:
    assert crossover(ratios).first == first
    assert crossover_sentence("X", "dense", ratios) == f"X: {says}"


def test_cliffs() -> None:
    """What takes over a tenth longer than a larger m, which need not be the next."""
    assert cliffs({}) == []
    assert cliffs({1: 10.0, 2: 10.9, 4: 10.0, 8: 30.0}) == []
    assert cliffs({1: 20.0, 2: 12.0, 4: 11.5, 8: 10.0, 16: 10.5}) == [Cliff(1, 8, 2.0), Cliff(2, 8, 1.2), Cliff(4, 8, 1.15)]
    times = {**dict.fromkeys(range(1, 6), 15.0), 3: 18.0, 6: 10.0, 8: 14.0, 9: 12.0}
    assert cliffs_named(cliffs(times), sorted(times)) == "m = 1 to 5 (up to 1.80x m = 6), 8 (1.17x m = 9)"


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_models() -> None:
    shapes = {name: [(x.n, x.k) for x in suite.linears] for name, suite in MODELS.items()}
    assert shapes["qwen2.5-7b"] == [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
    assert shapes["llama3.2-1b"] == [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)]
    assert shapes["bitnet-2b"] == [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]


def preset(given: Preset) -> Selection:
    kinds = tuple(KINDS[key] for key in given.kinds)
    suites = tuple(MODELS[name] for name in given.models)
    return Selection(suites, given.patterns, kinds, given.tokens, given.parts, given.peers, given.sustained)


def test_the_plan_says_the_most_first() -> None:
    groups = plan(preset(FULL))
    assert len({str(group) + str(group.pattern) for group in groups}) == len(groups)
    first_other = next(i for i, group in enumerate(groups) if group.pattern not in (None, "6:8"))
    assert all(group.pattern != "6:8" for group in groups[first_other:])
    assert [str(group) for group in groups[:2]] == [
        "qwen2.5-7b gemm FP8 m=1 burst dense",
        "qwen2.5-7b gemm FP8 6:8 m=1 burst ours",
    ]
    dense = [group for group in groups if group.contender == "dense"]
    assert len(dense) == len(KINDS) * (len(FULL.tokens) + len(FULL.sustained))  # once, whatever the patterns
    assert {group.kind.key for group in groups if group.contender == "torch"} == {"fp8", "int8"}
    assert len(plan(preset(QUICK))) == 2 * 3 * 3


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("64", [64]), ("1-4", [1, 2, 3, 4]), ("64-1024:320", [64, 384, 704, 1024]), ("1-10:4", [1, 5, 9]), ("1 - 2", [1, 2])],
)
def test_ranges_of_tokens(text: str, tokens: list[int]) -> None:
    assert list(token_range(text)) == tokens


@pytest.mark.parametrize("count", [1, 2, FEW_TOKENS, FEW_TOKENS + 1, 70, 300])
def test_a_curve_is_measured_coarsely_first(count: int) -> None:
    tokens = [3 * i + 1 for i in range(count)][::-1]
    order = in_turn(tokens)
    assert sorted(order) == sorted(tokens)
    if not is_curve(tokens):
        assert order == tokens
        return
    for half in (len(order) // 4, len(order) // 2):  # of what is measured first, no gap is much wider than it must be
        places = sorted((m - 1) // 3 for m in order[:half])
        assert max(np.diff(places)) <= 2 * 2 * count / half
        assert (places[0], places[-1]) == (0, count - 1)


def test_graphs_are_cold_for_every_contender() -> None:
    cache = 60 << 20
    for linear in MODELS["qwen2.5-7b"].linears:
        for kind in KINDS.values():
            count = copies([linear], kind, 1, cache)
            half = linear.n * linear.k * kind.size // 2
            assert count == MOST_CALLS or count * half >= 0.99 * CACHES * cache
    assert copies([Linear("x", 8, 8)], KINDS["int8"], None, cache) == MOST_CALLS
    assert copies(MODELS["qwen2.5-7b"].linears, KINDS["bf16"], 16384, cache) == 1


# ---- floors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.key)
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "8:10"])
def test_packed_bytes_are_those_of_packed_weights(kind, pattern) -> None:
    w = np.random.default_rng(1).standard_normal((24, 130)).astype(np.float32)
    assert packed_bytes(kind, pattern, 24, 130) == ss.pack(w, pattern, kind.name, prune="magnitude").nbytes


def test_work() -> None:
    gemm = work("gemm", KINDS["fp8"], "6:8", 16, 64, 256)
    weights = 64 * (256 * 3 // 4 + 256 * 3 // 16 + 4)
    assert (gemm.flops, gemm.slid_flops) == (2 * 16 * 64 * 256, 3 * 16 * 64 * 256)
    assert gemm.bytes == weights + 16 * (256 + 4) + 16 * 64 * 2
    assert work("linear", KINDS["fp8"], "6:8", 16, 64, 256).bytes == weights + 16 * 256 * 2 + 16 * 64 * 2
    assert work("quantize", KINDS["fp8"], "6:8", 16, 64, 256).bytes == 16 * (256 * 2 + 256 + 4)
    assert work("pack", KINDS["fp8"], "6:8", None, 64, 256).bytes == 64 * 256 * 2 + weights
    assert work("gemm", KINDS["bf16"], "2:4", 16, 64, 256).bytes == 64 * (256 + 32) + 16 * 256 * 2 + 16 * 64 * 2


def made_up(**facts: object) -> Results:
    """Results of an imaginary GPU: two layers, two m, ours at 10 us, dense at 12 and 9."""
    results = Results(
        started="2000-01-01T00:00:00+00:00",
        machine={"gpu": "Imaginary GPU", "driver": "1"},
        selection={},
        suites={"model": [("a", 64, 256), ("b", 128, 256)]},
        bandwidth={"copy": 1e12},
        ceilings={"fp8": {"burst": 1e15}},
        complete=True,
        **facts,  # type: ignore[arg-type]
    )
    for layer, n in (("a", 64), ("b", 128)):
        for m, dense in ((16, 12.0), (4096, 9.0)):
            for contender, pattern, us in (("ours", "6:8", 10.0), ("dense", None, dense), ("cusparselt", "6:8", 20.0)):
                facts = {"us": us, "spread": 0.01 * n, "repeats": 5, "calls": 4}
                results.add(Cell(contender, "gemm", "model", layer, n, 256, "fp8", pattern, m, "burst", **facts))
    return results


def test_floor_is_the_larger_of_bytes_and_operations() -> None:
    results, layers = made_up(), [("a", 64, 256)]
    few, many = (work("gemm", KINDS["fp8"], "6:8", m, 64, 256) for m in (16, 1 << 20))
    assert floor_us(results, "gemm", "fp8", "6:8", layers, 16, "burst") == pytest.approx(few.bytes / 1e12 * 1e6)
    results.ceilings["fp8"]["burst"] = 1e12
    assert floor_us(results, "gemm", "fp8", "6:8", layers, 1 << 20, "burst") == pytest.approx(many.slid_flops / 1e12 * 1e6)
    assert floor_us(results, "gemm", "fp8", "6:8", layers, 1 << 20, "sustained") == pytest.approx(many.bytes / 1e12 * 1e6)
    results.bandwidth.clear()
    assert floor_us(results, "gemm", "fp8", "6:8", layers, 16, "burst") is None


def test_ceilings_are_per_type_and_load() -> None:
    for rates in CEILINGS.values():
        assert set(rates) == set(KINDS)
        assert all(rate["sustained"] < rate["burst"] for rate in rates.values())


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_figures_add_layers_up() -> None:
    total, large = figures(made_up())
    assert (total.layer, total.us, total.dense, total.cusparselt, total.torch) == (ALL, 20, 24, 40, None)
    assert total.over(total.dense) == pytest.approx(1.2)
    assert total.spread == pytest.approx(1.28)  # the larger of the layers'
    assert total.tflops == pytest.approx(2 * 16 * 192 * 256 / 20e-6 * 1e-12)
    assert large.over(large.dense) == pytest.approx(0.9)
    assert [figure.layer for figure in figures(made_up(), each=True)] == ["a", "b", ALL] * 2


def test_a_missing_layer_leaves_no_sum() -> None:
    results = made_up()
    results.add(Cell("ours", "gemm", "model", "b", 128, 256, "fp8", "6:8", 16, "burst", blank="wrong: by far", wrong=True))
    total = next(iter(figures(results)))
    assert (total.us, total.blank, total.of_floor, total.gbs) == (None, "wrong: by far", None, None)
    (_, columns, rows), *_ = sections(results)
    assert rows[0][columns.index("us")] == "wrong"
    assert list(blanks(results)) == ["1 blank of ours (this library): wrong: by far"]
    assert len(results.wrong) == 1


def test_a_row_stays_as_long_as_one_layer_was_tried() -> None:
    results = made_up()
    for layer, n, rows in (("a", 64, 2), ("b", 128, 1)):
        blank = "not measured: its time was spent"
        results.add(Cell("ours", "gemm", "model", layer, n, 256, "fp8", "6:8", 16, "burst", blank=blank))
        (_, columns, found), *_ = sections(results)
        assert len(found) == rows
        assert [row[columns.index("us")] for row in found][: rows - 1] == ["not measured"] * (rows - 1)


def test_sections_leave_empty_columns_out() -> None:
    ((title, columns, rows),) = sections(made_up())
    assert title == "model, gemm, burst: sum of a (64, 256), b (128, 256)"
    assert "x cuSPARSELt" in columns
    assert "x PyTorch" not in columns
    assert [row[columns.index("x dense")] for row in rows] == ["1.20x", "0.90x"]
    assert list(crossovers(made_up())) == [
        "FP8 6:8 product, model, in bursts: faster than dense cuBLASLt only at m = 16; slower at m = 4096 (0.90x)."
    ]


def over_tokens(us: dict[int, float], layers: tuple[str, ...] = ("a", "b")) -> Results:
    """made_up(), with ours at these m: of INT8 and BF16, dense twice as long, and layer b as long as at the largest m."""
    results = made_up()
    results.suites = {"model": [layer for layer in results.suites["model"] if layer[0] in layers]}
    results.cells.clear()
    for type in ("int8", "bf16"):
        for m in in_turn(list(us)):
            for layer, n, k in results.suites["model"]:
                time = us[m] if layer == "a" else us[max(us)]
                for contender, pattern, slower in (("dense", None, 2), ("ours", "6:8", 1)):
                    results.add(Cell(contender, "gemm", "model", layer, n, k, type, pattern, m, "burst", us=slower * time))
    return results


def test_tables_of_curves() -> None:
    us = {m: 10.0 + m for m in range(1, 61)}
    results = over_tokens(us)
    ((title, columns, rows),) = sections(results)
    assert title == f"model, gemm, burst: sum of a (64, 256), b (128, 256); {CURVE_ROWS} of 60 m, -v shows all"
    assert columns == ("m", "INT8 6:8 us", "x dense", "% of floor", "BF16 6:8 us", "x dense", "% of floor")
    tokens = [int(row[0]) for row in rows]
    assert (len(rows), tokens[0], tokens[-1], tokens) == (CURVE_ROWS, 1, 60, sorted(tokens))
    assert rows[0][1:3] == ("81.0", "2.00x")
    tables = list(sections(results, each=True))
    titles = ["a (64, 256)", "b (128, 256)", "sum of a (64, 256), b (128, 256)"]
    assert [title for title, _, _ in tables] == [f"model, gemm, burst: {what}" for what in titles]
    assert all([int(row[0]) for row in rows] == list(us) for _, _, rows in tables)
    results.add(Cell("ours", "gemm", "model", "a", 64, 256, "bf16", "6:8", 2, "burst", blank="wrong: by far", wrong=True))
    assert next(sections(results, each=True))[2][1] == ("2", "12.0", "2.00x", "0%", "wrong", "", "")


def test_cliffs_are_named_layer_by_layer() -> None:
    us = {m: 10.0 + m for m in range(1, 20)}
    assert list(cliff_sentences(over_tokens(us))) == [
        f"{type} 6:8 product, model, in bursts: at no m over 1.1 times as long as with more tokens, in any layer."
        for type in ("INT8", "BF16")
    ]
    us[4] = 40.0
    sentence = "INT8 6:8 product, model, in bursts: over 1.1 times as long as with more tokens: a at m = 4 (2.67x m = 5)."
    assert next(cliff_sentences(over_tokens(us))) == sentence
    assert next(cliff_sentences(over_tokens(us, ("a",)))) == sentence.replace("a at", "at")
    few = {1: 30.0, 2: 10.0}
    assert next(cliff_sentences(over_tokens(few))).endswith("a at m = 1 (3.00x m = 2).")
    assert not list(cliff_sentences(made_up()))


@pytest.mark.parametrize(("value", "text"), [(None, ""), (0.123, "0.12"), (9.99, "9.99"), (41.23, "41.2"), (4123.4, "4123")])
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_what_stands_against_a_whole_linear() -> None:
    results = made_up()
    for layer, n in (("a", 64), ("b", 128)):
        results.add(Cell("ours", "linear", "model", layer, n, 256, "fp8", "6:8", 16, "burst", us=15))
        results.add(Cell("torch", "linear", "model", layer, n, 256, "fp8", None, 16, "burst", us=60))
    linear = next(figure for figure in figures(results) if figure.part == "linear")
    assert (linear.dense, linear.torch) == (24, 120)
    assert (
        "whole linear, model, in bursts: faster than PyTorch's dynamic linear at m = 16 (4.00x)"
        in list(crossovers(results))[-1]
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    results = made_up(notes=["a", "a note"], seconds=1.5)
    results.add(Cell("ours", "pack", "model", "a", 64, 256, "fp8", "6:8", None, "burst", blank="no", wrong=True))
    results.add(Cell("dense", "gemm", "model", ALL, None, None, "fp8", None, 16, "sustained", us=1, watts=700.5, mj=3, rows=32))
    results.save(tmp_path / "a.json")
    again = load(tmp_path / "a.json")
    assert again == results
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json"}


def published() -> Results | None:
    path = ROOT / readme.PUBLISHED
    return load(path) if path.exists() else None


def test_readme_shows_the_published_results() -> None:
    """Or says that there are none."""
    text = (ROOT / "README.md").read_text()
    shown = re.search(f"{re.escape(readme.BEGIN)}\n\n(.*)\n{re.escape(readme.END)}", text, re.DOTALL)
    assert shown, "README.md: the markers of the benchmark section are missing"
    assert shown[1] == readme.section(published()), f"run python tools/bench.py --readme {readme.PUBLISHED}"


def test_published_results_can_be_read_and_were_right() -> None:
    """As many as there are."""
    for path in sorted((ROOT / "docs" / "results").glob("*.json")):
        results = load(path)
        assert not results.wrong
        assert results.bandwidth["copy"] > 0
        assert path.with_suffix(".png").exists()
        assert '"/' not in path.read_text(), "a path of the machine it was made on"
        assert {cell.contender for cell in results.cells.values()} <= {"ours", *PEERS}


def test_published_tables_are_those_of_the_results() -> None:
    """As many as there are."""
    for path in sorted((ROOT / "docs" / "results").glob("*.txt")):
        shown = call("--from", path.with_suffix(".json"), "-v")
        assert path.read_text() == shown.stdout, f"run python tools/bench.py --from {path.with_suffix('.json')} -v > {path}"


def test_readme_section_of_results(tmp_path: Path) -> None:
    text = readme.section(made_up())
    assert "| m | 16 | 4096 |" in text
    assert "| FP8 | 20.0: 1.20 / 2.00 | 20.0: 0.90 / 2.00 |" in text
    assert "time budget" not in text
    assert "time budget; everything shown was measured." in readme.section(Results("2000", {}, {}, {}))
    blank = made_up()
    blank.complete = False
    blank.add(Cell("ours", "gemm", "model", "a", 64, 256, "int8", "6:8", 16, "burst", blank="not measured: no time"))
    blank.add(Cell("dense", "gemm", "model", "a", 64, 256, "int8", None, 16, "burst", us=9, rows=32))
    assert "time budget; what is missing was not measured." in readme.section(blank)
    assert "more tokens than m, since they take no fewer: dense INT8 32 at m = 16." in readme.section(blank)
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.rewrite(page, made_up())
    assert page.read_text() == f"before\n{readme.BEGIN}\n\n{text}\n{readme.END}\nafter\n"
    assert not readme.rewrite(page, made_up())
    page.write_text("no markers")
    with pytest.raises(ss.FormatError, match="must hold the lines"):
        readme.rewrite(page, None)


def test_a_picture_needs_a_dense_peer(tmp_path: Path) -> None:
    from tools.benchmark import picture

    picture.draw(made_up(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = made_up()
    alone.cells = {key: cell for key, cell in alone.cells.items() if cell.contender != "dense"}
    with pytest.raises(ss.FormatError, match="no product with a dense peer"):
        picture.draw(alone, tmp_path / "b.png")
    assert picture.curves(made_up()) == ("model", {"fp8": {"6:8": {16: 1.2, 4096: pytest.approx(0.9)}}})


@pytest.mark.parametrize("layers", [("a",), ("a", "b")])
def test_the_picture_of_many_m_is_of_times(layers: tuple[str, ...]) -> None:
    """A panel a type and layer, the sum first; dense, floor, ours, and rings around cliffs."""
    from tools.benchmark import curve

    us = {m: 10.0 + m for m in range(1, 20)} | {4: 40.0}
    drawn = curve.times(over_tokens(us, layers), "model")
    titles = [axes.get_title(loc="left") for axes in drawn.axes]
    shapes = ["a (64, 256)", "b (128, 256)"][: len(layers)]
    panels = [f"{type}: {what}" for type in ("INT8", "BF16") for what in ["sum of the layers"] * (len(layers) > 1) + shapes]
    assert titles == panels
    lines = drawn.axes[titles.index("INT8: a (64, 256)")].get_lines()
    dense, floor, ours, ringed = ([*map(list, line.get_data())] for line in lines)
    assert (dense[0], dense[1]) == (list(us), [2 * us[m] for m in us])
    assert (floor[0], ours[0], ours[1]) == (list(us), list(us), list(us.values()))
    assert ringed == [[4], [40.0]]


# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.key)
def test_right_products_pass_and_wrong_ones_do_not(kind) -> None:
    rng = np.random.default_rng(4)
    packed = ss.pack(rng.standard_normal((40, 2048)).astype(np.float32), "6:8", kind.name, prune="magnitude")
    bf16 = ss.pack(np.zeros((1, 4), np.float32), "2:4", "bfloat16").dtype.numpy
    x = rng.standard_normal((9, 2048)).astype(np.float16 if kind.key == "fp16" else bf16)
    y = ss.matmul(x, packed)
    check.check_product(y, x, packed)
    # of a stage of 128 slid columns left out, every element is within its bound at long k, but the whole is not
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
    packed = ss.pack(w, "6:8", "int8", prune="magnitude")
    check.check_packed(packed, w)
    packed.meta[2, 3] ^= 0x40 if packed.meta[2, 3] != 0x44 else 0x80
    with pytest.raises(ss.VerificationError, match="packed meta differ"):
        check.check_packed(packed, w)
    q = ss.quantize(w, packed)
    check.check_quantized(q.values, q.scale, w, packed)
    q.values[1, 1] += 1
    with pytest.raises(ss.VerificationError, match="quantized tokens differ"):
        check.check_quantized(q.values, q.scale, w, packed)
    packed = ss.pack(w, "6:8", "float16", prune="magnitude")
    q = ss.quantize(w, packed)
    check.check_quantized(q.values, q.scale, w, packed)
    with pytest.raises(ss.VerificationError, match="quantized tokens differ"):
        check.check_quantized(q.values, q.scale, w * np.float32(1.01), packed)


def test_samples_hold_both_ends() -> None:
    rng = np.random.default_rng(6)
    for count in (1, 2, 15, 16, 17, 100_000):
        found = check.sample(count, 16, rng)
        assert found[0] == 0
        assert found[-1] == count - 1
        assert len(set(found.tolist())) == len(found) == min(count, 16)


def test_groups_print_themselves() -> None:
    group = Group("ours", "gemm", MODELS["qwen2.5-7b"], KINDS["int8"], "6:8", 16, "burst")
    assert str(group) == "qwen2.5-7b gemm INT8 6:8 m=16 burst ours"
