"""python -m lib.book.bench [chapter ...]: run the benchmarks tests/<chapter>/bench.py and keep the table that the book shows (`make bench`).

A benchmark file has `rows()`, which yields (what, number, unit, note). The result is data/bench.json, with the machine and the versions that it was measured on; it is committed, because
a book that is built elsewhere must not show that machine's numbers as if they were these.
"""
import importlib.util
import json
import os
import platform
import sys
from datetime import date

from .paths import ROOT

FILE = ROOT / "data" / "bench.json"


def machine() -> dict:
    """Where the numbers come from."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), model)
    except OSError:
        pass
    return {"processor": model, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version(),
            "torch": version("torch"), "numpy": version("numpy"), "date": date.today().isoformat()}


def benchmarks() -> dict:
    """chapter -> path of its benchmark file"""
    return {p.parent.name: p for p in sorted((ROOT / "tests").glob("*/bench.py"))}


def load() -> dict:
    """What was measured last: {chapter: {"machine": ..., "rows": [[what, number, unit, note], ...]}}"""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main(argv=None):
    chapters = argv or sys.argv[1:] or list(benchmarks())
    unknown = set(chapters) - set(benchmarks())
    if unknown:
        sys.exit(f"no benchmark for {sorted(unknown)}; there is one for {sorted(benchmarks())}")
    kept = load()
    for chapter in chapters:
        spec = importlib.util.spec_from_file_location(f"bench_{chapter}", benchmarks()[chapter])
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows = []
        for what, number, unit, note in module.rows():
            rows.append([what, round(float(number), 4), unit, note])
            print(f"{chapter}: {what}: {number:.4g} {unit}  {note}", flush=True)
        kept[chapter] = {"machine": machine(), "rows": rows}
        FILE.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
