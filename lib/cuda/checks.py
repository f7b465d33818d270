"""Find what a wrong kernel hides: out-of-bounds accesses, races between threads, barriers that not all threads reach."""
import itertools
import os
import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np

from . import cpu
from .errors import ArgumentError, CompileError, KernelError
from .signature import check_arguments, check_shape

SANITIZERS = {"AddressSanitizer": ["-fsanitize=address"], "ThreadSanitizer": ["-fsanitize=thread"]}


@dataclass(frozen=True)
class Finding:
    """kind: "out of bounds", "race", "barrier", "deadlock", "mask" or "stack"; line: in the .cu file, 0 if unknown; array: the argument's or
    shared array's name, "" if unknown; says: a sentence."""
    kind: str
    line: int
    array: str
    says: str


@dataclass(frozen=True)
class Report:
    """findings: all different ones; tools: what looked; skipped: what could not, and why."""
    findings: tuple[Finding, ...]
    tools: tuple[str, ...]
    skipped: tuple[str, ...]

    @property
    def clean(self):
        return not self.findings

    def __str__(self):
        lines = [f.says for f in self.findings] or ["nothing found"]
        return "\n".join([*lines, "looked with: " + ", ".join(self.tools), *(f"not used: {s}" for s in self.skipped)])


def check(kernel, grid, block, args, shared=0, timeout=120):
    """Run a kernel once under each sanitizer that the compiler has, in a child process on copies of the NumPy arrays, and report what they find.

    AddressSanitizer finds accesses outside of argument arrays and of shared ones, ThreadSanitizer accesses of two threads of a block that no barrier
    orders; both give source lines. Where there is none, accesses that leave an argument array still fault, and results that depend on the order of
    the threads still differ, without lines. Not found: races between different blocks (they run one after another here).
    """
    grid, block = check_shape(grid, block, shared)
    ready, side = check_arguments(kernel.name, kernel.params, args)
    if side != "numpy":
        raise ArgumentError(f"{kernel.name}: check() takes numpy arrays, these are cupy's (compute-sanitizer is NVIDIA's tool for them)")
    findings, tools, skipped = [], [], []
    for tool, options in SANITIZERS.items():
        try:
            log = _run_child(kernel, grid, block, ready, shared, options, timeout)
        except CompileError as e:
            kernel.module.library("numpy")              # a source that does not compile at all is no matter of the sanitizer
            skipped.append(f"{tool} ({str(e).splitlines()[-1]})")
        except _NoSanitizer as e:
            skipped.append(f"{tool} ({e})")
        else:
            tools.append(tool)
            findings += _read(log, kernel)
    if "ThreadSanitizer" in tools:
        orders = ORDERS[:1]
    else:
        orders = ORDERS
        skipped.append("lines of races, and races that leave the result alone")
    if not any(f.kind != "race" for f in findings):     # far beyond an array there is no red zone, but a fence or nothing
        tools.append("fences" if len(orders) == 1 else "fences and thread orders")
        findings += _run_orders(kernel, grid, block, ready, shared, orders)
    return Report(tuple(dict.fromkeys(findings)), tuple(tools), tuple(skipped))


ORDERS = (("up", 1), ("down", 1), ("shuffled", 1), ("shuffled", 2))


class _NoSanitizer(Exception):
    pass


def _run_child(kernel, grid, block, args, shared, sanitizer, timeout):
    if "ziglang" in cpu.compiler():
        raise _NoSanitizer("ziglang brings no sanitizers; g++ and clang++ do")
    program = cpu.build(cpu.as_cpp(kernel.module), [*sanitizer, "-DCC_PROGRAM", "-g", "-O1", "-fno-omit-frame-pointer"], ".check")
    with tempfile.NamedTemporaryFile(suffix=".launch") as file:
        file.write(struct.pack("<8Q", *grid, *block, shared, len(args)))
        for p, a in zip(kernel.params, args):
            data = np.asarray(a).tobytes()
            file.write(struct.pack("<2Q", p.pointer, len(data)) + data)
        file.flush()
        index = str(kernel.module.names.index(kernel.name))
        env = dict(os.environ, ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0", TSAN_OPTIONS="exitcode=0:history_size=4")
        for prefix in ([], ["setarch", "-R"]):          # some kernels randomise addresses more than ThreadSanitizer can bear
            try:
                done = subprocess.run([*prefix, str(program), index, file.name], capture_output=True, text=True, env=env, timeout=timeout)
            except subprocess.TimeoutExpired:
                raise KernelError(f"{kernel.name}: not done after {timeout} s: does a thread wait for another one in a loop?") from None
            except OSError as e:
                raise _NoSanitizer(str(e)) from None
            if "FATAL: ThreadSanitizer" not in done.stderr:
                break
        else:
            raise _NoSanitizer(re.search(r"FATAL: [^\n]*", done.stderr)[0])
    if done.returncode and not re.search("cudacpu-|Sanitizer", done.stderr):
        raise KernelError(f"{kernel.name}: the checked program stopped with status {done.returncode}: {done.stderr[-400:]}")
    return done.stderr


def _read(log, kernel):
    """The findings in what a checked program wrote to stderr."""
    file = re.escape(kernel.module.filename)
    names = [*(p.name for p in kernel.params), "dynamic shared memory"]
    places = [(int(lo, 16), int(n), names[int(i)]) for i, lo, n in re.findall(r"cudacpu-array (-?\d+) (\w+) (\d+)", log)]

    def name(address, text):
        near = [(abs(address - lo - n // 2) - n // 2, arg) for lo, n, arg in places]
        if near and min(near)[0] < 4096:                # inside the array, or near it
            return min(near)[1]
        inside = re.search(r"global (?:variable )?'([^']+)'", text)
        return re.sub(r".*::", "", inside[1]) if inside else ""

    for text in re.split(r"={18,}", log):
        if "ThreadSanitizer: data race" in text:
            access = re.findall(rf"((?:Previous )?(?:atomic )?(?:write|read)) of size \d+ at 0x(\w+)[^\n]*\n(?:\s+#\d+ [^\n]*\n)*?\s+#\d+ [^\n]*?{file}:(\d+)", text, re.I)
            if len(access) == 2:                        # both in the source, not in the scheduler's book-keeping
                array = name(int(access[0][1], 16), text)
                deeds = sorted({(int(line), re.sub("previous ", "", what.lower())) for what, _, line in access}, reverse=True)
                says = " and ".join(f"a {what} at line {line}" for line, what in deeds)
                yield Finding("race", deeds[0][0], array, f"race on '{array}': {says} by two threads, with no barrier between" if len(deeds) > 1 else
                              f"race on '{array}': {says} by two threads")
        found = re.search(rf"AddressSanitizer: [\w-]+ on (?:unknown )?address 0x(\w+).*?\n(?:The signal is caused by a )?(\w+) (?:of size (\d+)|memory access).*?{file}:(\d+)", text, re.S)
        if found:
            array = name(int(found[1], 16), text)
            size = f" of {found[3]} bytes" if found[3] else ""
            yield Finding("out of bounds", int(found[4]), array, f"out of bounds: a {found[2].lower()}{size} at line {found[4]} outside of '{array}'")
    for kind, number, text in re.findall(r"cudacpu-error (\w+)\t(-?\d+)\t([^\n]*)", log):
        kind = "out of bounds" if kind == "bounds" else kind
        yield Finding(kind, max(0, int(number)), "", f"{kind}: {text}")


def _run_orders(kernel, grid, block, args, shared, orders):
    """Fenced runs, one in each order of the threads. A fault names the array; results that differ (by more than the rounding of sums) are a race."""
    outcomes = []
    for order, seed in orders:
        copies = [a.copy() if p.pointer else a for p, a in zip(kernel.params, args)]
        if len(orders) > 1:                             # shared arrays still hold the last run's values, the right ones: spoil them
            try:
                kernel.module.library("numpy").run(kernel, grid, block, [np.zeros_like(a) if p.pointer else a for p, a in zip(kernel.params, args)], shared)
            except KernelError:
                pass
        try:
            kernel.module.library("numpy").run(kernel, grid, block, copies, shared, order, seed, strict=True)
        except KernelError as e:
            line, array = re.search(r"line (\d+)", str(e)), re.search(r"array '(\w+)'", str(e))
            kind = "out of bounds" if array or " touches " in str(e) else "barrier"
            return [Finding(kind, int(line[1]) if line else 0, array[1] if array else "", f"{kind}: {e}")]
        outcomes.append(copies)
    return [Finding("race", 0, p.name, f"race: '{p.name}' depends on the order in which the threads run")
            for i, p in enumerate(kernel.params) if p.pointer
            if not all(np.allclose(a[i], b[i], rtol=1e-3 * (p.dtype.kind == "f"), atol=0, equal_nan=p.dtype.kind == "f") for a, b in itertools.pairwise(outcomes))]
