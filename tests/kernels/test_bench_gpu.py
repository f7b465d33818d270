"""`make bench-gpu` is no dead code where there is no GPU: its cases run here, small, on the processor, and must agree with their peers."""
import json
import sys

import numpy as np
import pytest

from lib.book import bench_gpu
from lib.cuda import Module, gpu_available


@pytest.mark.parametrize("slug", sorted(bench_gpu.files()))
def test_cases_agree_with_their_peers(slug, compiler):
    rows = bench_gpu.cases(slug, np, tiny=True)
    assert rows and len({r.what for r in rows}) == len(rows)
    for c in rows:
        assert bench_gpu.difference(c.run(), c.peer_run()) <= c.rtol, c.what
        assert c.bytes > 0 and c.operations > 0 and 0 <= c.rtol < 0.2


def test_every_cu_file_has_cases():
    for path in (bench_gpu.ROOT / "lib" / "kernels").glob("*.cu"):
        assert path.stem in bench_gpu.files(), f"{path.name} has kernels that `make bench-gpu` does not measure: add tests/kernels/gpu_{path.stem}.py"
        assert Module.from_file(path).names


def test_table_says_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_gpu, "FILE", tmp_path / "bench_gpu.json")
    assert "No GPU time has been measured" in repr(bench_gpu.gpu_table("kernels/first")) and "make bench-gpu" in bench_gpu.gpu_table("kernels/first")._repr_html_()
    record = {"machine": {"gpu": "A & B", "cuda": "13000", "torch": "2", "cupy": "14", "date": "2026-01-01"}, "rows": [["tiled <x>", 20.0, "cuBLAS", 5.0, 4000, 1]]}
    (tmp_path / "bench_gpu.json").write_text(json.dumps({"first": record}))
    html = bench_gpu.gpu_table("kernels/first")._repr_html_()
    assert "A &amp; B" in html and "tiled &lt;x&gt;" in html and "<td>4.00</td>" in html and "20.0" in repr(bench_gpu.gpu_table("kernels/first"))
    with pytest.raises(ValueError, match="key='kernels/nothing'"):
        bench_gpu.gpu_table("kernels/nothing")


def test_without_a_gpu_it_says_so(monkeypatch):
    if gpu_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="bench-gpu needs a GPU"):
        bench_gpu.main(["first"])
    with pytest.raises(SystemExit, match="no GPU cases for"):
        bench_gpu.main(["nothing"])
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "nothing"])
    with pytest.raises(SystemExit, match="nothing"):
        bench_gpu.main()


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    wrong = bench_gpu.Case("x", lambda: np.ones(3), "y", lambda: np.zeros(3), 1, 1, 0.1)
    assert bench_gpu.difference(wrong.run(), wrong.peer_run()) > wrong.rtol
    with pytest.raises(ValueError, match="shapes"):
        bench_gpu.difference(np.ones(3), np.ones(4))


@pytest.mark.gpu
def test_measured_on_a_gpu():
    there, why = gpu_available()
    if not there:
        pytest.skip(why)
    import cupy as cp
    assert bench_gpu.measure("first", cp)
