"""`tools/accuracy.py` without PyTorch: texts cut from packages, and the page of what was measured."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import slidesparse_nb as ss
from tools.accuracy import accuracy
from tools.study import page, texts
from tools.study.store import Store

TAGGED = "\n\n\n\tHe/pps said/vbd ,/, ``/`` no/at ''/'' ./. ./.\n\n\tIt/pps is/bez ./.\n"
TAGGED += "\n\n\n\tEnd/nn (/( of/in it/ppo )/) ;/; ;/;\n"


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_texts(tmp_path: Path) -> None:
    documents = {f"package/ca0{i}": TAGGED.replace("He", f"He{i}").encode() for i in (2, 1, 3)}
    brown = archive(tmp_path / "brown.tgz", {**documents, "package/README": b"no/at"})
    assert texts.brown(brown)[0] == 'He1 said, "no". It is.\nEnd (of it);'
    speeches = {f"package/sotu/data/{year}_a_b_d.txt": f" {year} \n".encode() for year in (1990, 1981, 1980)}
    addresses = archive(tmp_path / "addresses.tgz", speeches)
    assert texts.addresses(addresses) == ["1981", "1990"]
    with pytest.raises(ss.FormatError, match="has no file named like"):
        texts.addresses(brown)
    (tmp_path / "broken.tgz").write_bytes(b"none")
    with pytest.raises(ss.FormatError, match=r"is no \.tgz of npm"):
        texts.brown(tmp_path / "broken.tgz")


def test_pieces_are_spread_over_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PIECE", 10)
    found = texts.pieces(range(100), 3)
    assert found.tolist() == [*range(10), *range(45, 55), *range(90, 100)]
    assert found.dtype == np.uint16
    assert texts.pieces(range(70000), 2).dtype == np.uint32
    with pytest.raises(ss.OperandError, match="has 29 tokens, fewer than 3 pieces of 10"):
        texts.pieces(range(29), 3)


def figures(perplexity: float, **more: Any) -> dict[str, Any]:
    return {"texts": {"brown": {"perplexity": perplexity, "predicted": 1234, "divergence": 0.25, "agreement": 0.5}}, **more}


def test_the_page_shows_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "found.json")
    setup = {"model": "M", "window": 512, "machine": "a GPU", "texts": {"brown": {"title": "Brown"}}}
    store.set_up({**setup, "calibration": {"title": "even", "tokens": 4096, "window": 2048}})
    store.add("points", "dense", figures(40.0))
    with pytest.raises(ss.FormatError, match="nothing but the dense model was measured"):
        page.draw(store.read(), tmp_path / "no.png")
    for pattern, perplexity in (("6:8", 45.678), ("2:4", 130.0)):
        facts = {"pattern": pattern, "method": "wanda", "scheme": "INT8_W8A8"}
        store.add("points", f"{pattern} wanda INT8_W8A8", figures(perplexity, **facts))
    used = {"0 qkv": "2:4", "0 o": "dense"}
    facts = {"pattern": "mixed", "method": "sparsegpt", "scheme": "INT8_W8A8", "patterns": used, "ideal_speedup": 1.5}
    store.add("points", "mixed 1.5 sparsegpt INT8_W8A8", figures(44.0, **facts))
    store.add("sensitivity", "kind qkv 2:4", 0.125)
    store.add("pruning", "6:8 wanda", {"seconds": 3.0, "bytes": 2e9})
    document = tmp_path / "page.md"
    document.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    given = ["page", "--json", str(store.path), "--document", str(document), "--picture", str(tmp_path / "page.png")]
    assert CliRunner().invoke(accuracy, given, catch_exceptions=False).exit_code == 0
    text = document.read_text()
    assert (text.startswith("before\n"), text.endswith("after\n"), "old" in text) == (True, True, False)
    for line in (
        "| method | scheme | 2:4 | 6:8 |",
        "| Wanda | INT8_W8A8 | 130.00 | 45.68 |",
        "| 1.50x | SparseGPT | INT8_W8A8 | 1 2:4, 1 dense | 44.00 |",
        "| kind qkv | 0.1250 |",
        "| Wanda | 1 | 3.0 to 3.0 | 2.0 GB |",
        "![Perplexity over ideal speed-up](page.png)",
    ):
        assert line in text.splitlines()
    assert "FP8" not in text
    assert "MiniLM" not in text
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    again = text
    assert CliRunner().invoke(accuracy, given).exit_code == 0
    assert document.read_text() == again


def test_a_store_of_something_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "found.json")
    store.set_up({"window": 512})
    store.add("points", "a", 1)
    with pytest.raises(ss.OperandError, match="was measured with window 512, not 256; name another file"):
        store.set_up({"window": 256})
    assert json.loads(store.path.read_text()) == {"setup": {"window": 512}, "points": {"a": 1}}
    store.path.write_text("[]")
    with pytest.raises(ss.FormatError, match="is no JSON object"):
        store.read()
