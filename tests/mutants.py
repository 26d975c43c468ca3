"""Whether the tests notice a broken kernel: ``python -m tests.mutants``.

Each mutant is a known way to break the package, by one change of a source. The script copies the package to
``build/mutants/<name>``, applies the change, builds the best tier of this machine again if the change is in
``src_cython``, and runs the tests that concern the file until the first one fails. A mutant that no test notices is a
hole in the tests, and ends the script with an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutants"

# A mutant may loop for ever. The longest selection takes a quarter of this where two run at a time on two cores.
TIME_LIMIT = 1800

# What is asked of a row, a tile, a strip and a split row alike.
ROWS = ("test_semantics.py", "test_accuracy.py", "test_layouts.py", "test_schedule.py", "test_boundaries.py")


class Mutant(NamedTuple):
    """One way to break the package.

    Parameters
    ----------
    name : str
        A folder's name.
    path : str
        The source, from the root of the project.
    text, replacement : str
        What is changed, which occurs exactly once, and into what.
    breaks : str
        What is wrong then, in a sentence.
    tests : tuple of str
        The files of tests that are run, in this order.
    """

    name: str
    path: str
    text: str
    replacement: str
    breaks: str
    tests: tuple[str, ...] = ROWS


MUTANTS = (
    Mutant(
        "maximum-of-one-chunk",
        "src_cython/state.pxi",
        "    a.maximum = max(a.maximum, b.maximum)\n",
        "",
        "The maximum is not carried from one chunk of a row to the next.",
    ),
    Mutant(
        "sum-not-rescaled",
        "src_cython/state.pxi",
        "    a.high, a.low, a.exponent = by_power_of_two(a.high, k), by_power_of_two(a.low, k), exponent\n",
        "    a.exponent = exponent\n",
        "The sum so far is not rescaled when the maximum rises.",
    ),
    Mutant(
        "nan-passed-over",
        "src_cython/state.pxi",
        """        if arithmetic != MODERATE:
            z[j] = maximum(reference[j * step * REFERENCE + FLOOR], x[j] - reference[j * step * REFERENCE + OFFSET])
""",
        """        if arithmetic != MODERATE:
            z[j] = maximum(x[j] - reference[j * step * REFERENCE + OFFSET], reference[j * step * REFERENCE + FLOOR])
""",
        "A NaN beside a very small element is taken for one as small.",
    ),
    Mutant(
        "nothing-but-minus-infinity",
        "src_cython/batches.pxi",
        """    high = where_at_most(high, splat(FLT_MAX, &high), high, nan)
    high = where_at_most(high, splat(0.0, &high), nan, high)
""",
        "    high = where_at_most(high, splat(FLT_MAX, &high), high, nan)\n",
        "In 16 bits, probabilities of a row of nothing but -inf are not NaN where rows are side by side.",
        ("test_16_bits.py",),
    ),
    Mutant(
        "tail-dropped",
        "src_cython/rows.pxi",
        "    if n > i * width:\n        logits[0]",
        "    if n > i * width + 1:\n        logits[0]",
        "The last element of a row is not summed where it is alone behind whole registers.",
    ),
    Mutant(
        "tail-counted-again",
        "src_cython/rows.pxi",
        "cdef vec fill = reference[FLOOR] if arithmetic == MODERATE else tops  #",
        "cdef vec fill = splat(get(x, 0), x)  #",
        "Lanes behind the end of a row hold its first element, which counts once more in each.",
    ),
    Mutant(
        "neighbour-in-a-tile",
        "src_cython/tiles.pxi",
        "            band[i] = load(tile + min(first + i, n - 1))\n        finish(",
        "            band[i] = swap(load(tile + min(first + i, n - 1)), 1)\n        finish(",
        "The results of neighbouring rows of a tile change places.",
    ),
    Mutant(
        "short-rows-rounded",
        "src_cython/tiles.pxi",
        "high[j], low[j] = sums[j] if is_coarse else high[j] - base, sums[j]",
        "high[j], low[j] = sums[j] if is_coarse else high[j] - base, zero",
        "What the terms of short rows have beyond a digit of the largest is dropped.",
    ),
    Mutant(
        "behind-the-last-tile",
        "src_cython/tiles.pxi",
        "    return n_rows * n >= block_length(like) - n\n",
        "    return True\n",
        "Blocks of rows shorter than that are read and written beyond the end of the array.",
        ("test_boundaries.py", "test_schedule.py"),
    ),
    Mutant(
        "lost-parts-dropped",
        "src_cython/rows.pxi",
        "        lows[j * step] = lows[j * step] + lost\n",
        "",
        "What an addition to a lane's sum rounds off is dropped.",
    ),
    Mutant(
        "reciprocal-rounded",
        "src_cython/state.pxi",
        "    finishers[FACTOR_LOW] = factor * (minus_product(splat(1.0, &total), factor, total) - factor * rest)\n",
        "    finishers[FACTOR_LOW] = splat(0.0, &total)\n",
        "The reciprocal of the sum has no low part: an ULP of accuracy is lost.",
    ),
    Mutant(
        "subnormal-flushed",
        "src_cython/rows.pxi",
        "            v[j] = product(v[j], own[FACTOR], own[FACTOR_LOW])\n",
        """            v[j] = product(v[j], own[FACTOR], own[FACTOR_LOW])
            v[j] = where_at_most(splat(by_type(FLT_MIN, DBL_MIN, v), v), v[j], v[j], v[j] * splat(0.0, v))
""",
        "Probabilities below the smallest normal number are flushed to 0.",
    ),
    Mutant(
        "subnormal-rounded-twice",
        "src_cython/state.pxi",
        "    cdef vec low = times_plus(term, finishers[FACTOR_LOW] * raise_by, residual * factor)\n",
        "    cdef vec low = term * (finishers[FACTOR_LOW] * raise_by)\n",
        "Subnormal probabilities are made of terms that are rounded before.",
        ("test_subnormal_results.py",),
    ),
    Mutant(
        "bits-depend-on-threads",
        "src_cython/split.pxi",
        "            row.function != SOFTMAX, row.has_zero and chunk == 0, row.row_offset, &smallest)\n",
        """            row.function != SOFTMAX, row.has_zero and chunk == 0,
            offset_of_chunk(at(x, first), row.n - first, False), &smallest)
""",
        "Chunks of a row that threads share do not have the offset that they have on one thread.",
        ("test_schedule.py",),
    ),
    Mutant(
        "states-merged-backwards",
        "src_cython/split.pxi",
        "    for chunk in range(1, (row.n + length - 1) // length):\n",
        "    for chunk in range((row.n + length - 1) // length - 1, 0, -1):\n",
        "The states of a row that threads share are not merged in the order that they have on one thread.",
        ("test_schedule.py",),
    ),
    Mutant(
        "log-of-softmax",
        "src_cython/rows.pxi",
        "    write_chunk(SUBTRACT, x, y, n, <const vec*>NULL, log_scale_of(total, x), streaming)\n",
        """    cdef double rounded = total.maximum + log_sum(total, x)
    cdef Py_ssize_t i
    for i in range(n):
        put(y, i, log(to_lane(exp(get(x, i) - rounded), x)))
""",
        "log_softmax of a row is the logarithm of its softmax.",
    ),
    Mutant(
        "digits-of-the-rest",
        "src_cython/rows.pxi",
        "        if any_greater(enough, high):\n",
        "        if False and any_greater(enough, high):\n",
        "What a sum is without its maximum is a difference, however few digits that leaves.",
    ),
    Mutant(
        "stride-ignored",
        "src_cython/gather.pxi",
        """        read_elements(
            <const char*>x + x_offset, row.x_stride[row.count - 1],""",
        """        read_elements(
            <const char*>x + x_offset, stored_size(storage, <const vec*>target),""",
        "Elements that are collected are taken for adjacent ones.",
    ),
    Mutant(
        "reads-behind-the-end",
        "src_cython/rows.pxi",
        "        tops[1] = maximum(load_first(x + i, <int>(n - i * width), nothing), tops[1])\n",
        """        v = load(x + i)
        tops[1] = maximum(load_first(&v, <int>(n - i * width), nothing), tops[1])
""",
        "The memory behind the end of a row is read, though it changes no result.",
    ),
    Mutant(
        "writes-behind-the-end",
        "src_cython/rows.pxi",
        "        store_within(y, i, n, v[0])\n",
        "        store(y + i, v[0])\n",
        "The memory behind the end of a row of the output is overwritten.",
    ),
    Mutant(
        "mask-ignored-at-the-end",
        "src_cython/adjusted.pxi",
        "    store_within(y, i, n, where_true(mask + i * width, <int>(n - i * width), load_within(x, i, n), fills))\n",
        "    store_within(y, i, n, load_within(x, i, n))\n",
        "The mask is ignored behind the whole registers of a row.",
        ("test_where.py",),
    ),
    Mutant(
        "temperature-rounded",
        "src_cython/divided.pxi",
        """        for j in range(count):
            f[j] = fused(z[j], divisor[PER_POWER_LOW], f[j])
""",
        "",
        "The reciprocal of the temperature is rounded.",
        ("test_temperature.py",),
    ),
    Mutant(
        "bfloat16-truncated",
        "src_cython/simd.h",
        "rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "rounded = bits >> 16;",
        "Results of bfloat16 are truncated, not rounded to nearest.",
        ("test_16_bits.py",),
    ),
    Mutant(
        "last-block-dropped",
        "src_cython/threads.h",
        "memory_order_relaxed)) < pool.n_blocks)\n",
        "memory_order_relaxed)) < pool.n_blocks - 1)\n",
        "The last block of a call on threads is run by nobody.",
        ("test_threads.py", "test_schedule.py"),
    ),
    Mutant(
        "overlap-ignored",
        "src_cython/direct_calls.pxi",
        "        if not shape.in_place and overlap(source, target):\n            return None\n",
        "",
        "An output that overlaps a part of its input is written while that is read.",
        ("test_direct_calls.py",),
    ),
    Mutant(
        "products-rounded",
        "src_cython/derivatives.pxi",
        "        highs = two_sum(highs, total, &error)\n        lows = lows + error\n",
        "        highs = highs + total\n",
        "The sum of a vector-Jacobian product is added up in one number, with an error that grows with the row.",
        ("test_derivatives.py",),
    ),
    Mutant(
        "certain-label",
        "src_cython/cross_entropy.pxi",
        "label_gradient = label_factor * call.scale * expm1(log_p) + (",
        "label_gradient = label_factor * call.scale * (exp(log_p) - 1.0) + (",
        "The gradient of a label that is all but certain is a rounded probability less 1.",
        ("test_cross_entropy.py",),
    ),
    Mutant(
        "later-of-equals",
        "src_cython/best.pxi",
        "(a.value == b.value and a.index > b.index)",
        "(a.value == b.value and a.index < b.index)",
        "Of equal elements the top k has the last ones, not the first.",
        ("test_selection.py",),
    ),
    Mutant(
        "draws-the-impossible",
        "src_cython/sampling.pxi",
        "        if sums[middle] > target:\n",
        "        if sums[middle] >= target:\n",
        "An element that has no probability can be drawn.",
        ("test_sampling.py",),
    ),
    Mutant(
        "beyond-what-was-seen",
        "src_cython/streaming.pxi",
        "            if largest > totals[row].maximum:\n",
        "            if False:\n",
        "Probabilities of elements above all that a state has seen overflow.",
        ("test_streaming.py",),
    ),
    Mutant(
        "difference-rounded",
        "src_cython/weighted.pxi",
        "        errors[j] = where_at_most(least, load(a + j), errors[j], zero)\n",
        "        errors[j] = zero\n",
        "Beside factors, the rounding error of an element less its offset is dropped.",
        ("test_weighted.py",),
    ),
    Mutant(
        "factors-that-are-broadcast",
        "fastsoftmax/_layout.py",
        "            and self.b_stride == inner.size * inner.b_stride\n",
        "",
        "Dimensions are fused that are not one in the memory of the factors.",
        ("test_weighted.py", "test_derivatives.py"),
    ),
    Mutant(
        "calls-of-other-strides",
        "fastsoftmax/_remembered.py",
        "        return function, name, axis, x.dtype, x.shape, x.strides\n",
        "        return function, name, axis, x.dtype, x.shape\n",
        "A call is taken for one before that had other strides.",
        ("test_remembered.py",),
    ),
    Mutant(
        "masks-that-are-broadcast",
        "fastsoftmax/_layout.py",
        "            and self.mask_stride == inner.size * inner.mask_stride\n",
        "",
        "Dimensions are fused that are not one in the memory of the mask.",
        ("test_where.py", "test_weighted.py"),
    ),
    Mutant(
        "masked-from-the-first-chunk",
        "src_cython/weighted.pxi",
        "        hide(factors, call.mask + offset, &call.mask_row, first, n, 0.0)\n",
        "        hide(factors, call.mask + offset, &call.mask_row, 0, n, 0.0)\n",
        "Beside factors, every chunk of a row is masked as its first.",
        ("test_weighted.py",),
    ),
    Mutant(
        "lanes-of-short-rows-in-disorder",
        "src_cython/weighted.pxi",
        "            accumulate(&highs[l], &lows[l], highs[l + distance], lows[l + distance])\n",
        "            accumulate(&highs[l], &lows[l], highs[n_lanes - 1 - l], lows[n_lanes - 1 - l])\n",
        "Beside factors, the lanes of short rows are added in another order than those of a row alone, and some twice.",
        ("test_weighted.py",),
    ),
    Mutant(
        "forced-backend-gives-way",
        "fastsoftmax/_dispatch.py",
        "    loaded = load(forced)\n    if isinstance(loaded, Exception):\n",
        """    loaded = load(forced)
    if isinstance(loaded, Exception):
        return select(dtype, size, "numpy")
""",
        "A forced backend that cannot run gives way to another.",
        ("test_dispatch.py",),
    ),
    Mutant(
        "numba-merges-anything",
        "fastsoftmax/_state.py",
        "    if a.maximum < b.maximum:\n        a, b = b, a\n",
        "",
        "The state in Python, which Numba compiles, takes the first maximum for the larger one.",
        ("test_state.py",),
    ),
    Mutant(
        "numba-lanes-behind-the-end",
        "fastsoftmax/backends/numba_cpu/rows.py",
        "    return sum_terms(x, at, n, repeat(reference.floor), moderate, keep, terms, terms_at)\n",
        "    return sum_terms(x, at, n, group_of(x, 0.0), moderate, keep, terms, terms_at)\n",
        "In the Numba backend lanes behind the end of a row count as zeros.",
        ("test_properties.py", "test_semantics.py"),
    ),
    Mutant(
        "numba-kernels-of-one-name",
        "fastsoftmax/backends/numba_cpu/jit.py",
        '        function.__qualname__ += f"({names})"\n',
        "        pass\n",
        "Numba kernels that differ in what they close over have one name.",
        ("test_numba_cpu.py",),
    ),
    Mutant(
        "numba-ties-rounded-up",
        "fastsoftmax/backends/numba_cpu/stored.py",
        "np.uint32(size + odd + ",
        "np.uint32(size + np.uint32(1) + ",
        "In the Numba backend a result half way between two numbers of 16 bits is always rounded up.",
        ("test_dtype_argument.py",),
    ),
    Mutant(
        "numba-bfloat16-truncated",
        "fastsoftmax/backends/numba_cpu/registers.py",
        "builder.add(builder.add(bits, constant(0x7FFF)), odd)",
        "builder.add(bits, constant(0))",
        "In the Numba backend registers are truncated to bfloat16, not rounded to nearest.",
        ("test_16_bits.py",),
    ),
    Mutant(
        "numba-chunks-drawn-from-anew",
        "fastsoftmax/backends/numba_cpu/sampling.py",
        "        before = ends[chunk - 1] if chunk else 0.0\n",
        "        before = 0.0\n",
        "In the Numba backend the sums of a chunk do not go on from those before it.",
        ("test_sampling.py",),
    ),
    Mutant(
        "numba-label-of-another-chunk",
        "fastsoftmax/backends/numba_cpu/cross_entropy.py",
        "        if 0 <= label - first < n:\n",
        "        if first == 0 and 0 <= label < n:\n",
        "In the Numba backend the gradient of a label behind the first chunk is that of another class.",
        ("test_cross_entropy.py",),
    ),
    Mutant(
        "cuda-residue-lost",
        "fastsoftmax/cuda/_state.py",
        "    return total, residue + (error + a_low)\n",
        "    return total, residue\n",
        "In the CUDA backend, what sums round off is lost.",
        ("test_cuda.py",),
    ),
    Mutant(
        "cuda-differences-rounded",
        "fastsoftmax/cuda/_state.py",
        "        offset = OWN.zero if abs(maximum) <= OWN.limit else multiple\n",
        "        offset = maximum\n",
        "In the CUDA backend, elements are taken relative to the maximum, which rounds the difference.",
        ("test_cuda.py",),
    ),
)


class NotOnce(ValueError):
    """What a mutant changes does not occur exactly once."""


def mutated(mutant: Mutant, source: str) -> str:
    """Return a source with the change of a mutant.

    Raises
    ------
    NotOnce
        If what it changes does not occur exactly once.
    """
    if (count := source.count(mutant.text)) != 1:
        raise NotOnce(f"{mutant.name}: in {mutant.path} this occurs {count} times, not once:\n{mutant.text}")
    return source.replace(mutant.text, mutant.replacement)


class Outcome(NamedTuple):
    """What became of a mutant: the test that noticed it, or None; and all output, to look at where it is a surprise."""

    noticed_by: str | None
    log: str


def extension_modules() -> list[Path]:
    """The extension modules of this environment's package, which are built from the sources as they are."""
    import fastsoftmax  # noqa: F401  (an editable install is built again at the import)
    from fastsoftmax.backends.compiled import tiers

    names = [*(f"_kernels_{tier}" for tier in tiers()), "_threads", "_output_cache", "cython_softmax"]
    specs = [find_spec(f"fastsoftmax.{name}") for name in names]
    return [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]


def best_tier() -> str:
    from fastsoftmax.backends.compiled import tiers

    return tiers()[0]


def prepare(folder: Path, modules: Iterable[Path]) -> None:
    """Copy the sources, the tests and the extension modules to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("examples", "fastsoftmax", "src_cython", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("Makefile", "meson.build", "meson.options", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for module in modules:
        shutil.copy(module, folder / "fastsoftmax")


def run(command: list[str], folder: Path, **environment: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FASTSOFTMAX", "PYTEST"))}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=kept | environment,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
        return -1, output.decode() if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def build(folder: Path, tier: str, modules: Iterable[Path]) -> None:
    """Build one tier and the smaller modules again, and remove the other tiers but the portable one.

    That one tells what the processor runs and is not asked for more. At -O1 a tier takes a third of its time at -O3.
    """
    setup = ["meson", "setup", "-Doptimization=1", "built"]
    names = {module.name for module in modules}
    targets = [
        name for name in sorted(names) if not name.startswith("_kernels") or name.startswith(f"_kernels_{tier}.")
    ]
    for command in (setup, ["ninja", "-C", "built", *(f"src_cython/{name}" for name in targets)]):
        status, log = run(command, folder)
        if status:
            raise RuntimeError(f"{folder.name} cannot be built: {log[-3000:]}")
    for name in names:
        if name in targets:
            shutil.copy(folder / "built" / "src_cython" / name, folder / "fastsoftmax")
        elif name.startswith("_kernels_x86"):
            (folder / "fastsoftmax" / name).unlink()


def tests_of(paths: Iterable[str], expression: str) -> list[str]:
    """The command that runs some files of tests until the first failure."""
    options = ["-x", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", expression]
    return [sys.executable, "-m", "pytest", *options, *(f"tests/{path}" for path in paths)]


def outcome_of(status: int, log: str) -> Outcome:
    """Read the name of the first test that failed, or that was running when the process ended or had to be ended."""
    if status == 0:
        return Outcome(None, log)
    if failed := re.search(r"^FAILED tests/(.+?)( - .*)?$", log, re.MULTILINE):
        return Outcome(failed[1], log)
    started = re.findall(r"^tests/(\S+::.+?) *(?:(?:PASSED|SKIPPED|XFAIL|Fatal Python error).*)?$", log, re.MULTILINE)
    if status < 0 and started:
        return Outcome(f"{started[-1]} ({'does not end' if status == -1 else f'signal {-status}'})", log)
    raise RuntimeError(f"no test failed, but pytest ended with {status}: {log[-3000:]}")


def expression_for(path: str) -> str:
    """Which tests of a file concern a source: for the compiled backend those on the tier that was built."""
    if "numba_cpu" in path:
        return "numba"
    return "not numba and not portable and not numpy"


def try_mutant(mutant: Mutant, modules: list[Path], tier: str) -> Outcome:
    folder = FOLDER / mutant.name
    prepare(folder, modules)
    source = folder / mutant.path
    if mutant.text:
        source.write_text(mutated(mutant, source.read_text()))
    if mutant.path.startswith("src_cython"):
        build(folder, tier, modules)
    command = tests_of(mutant.tests, expression_for(mutant.path))
    editable = ":".join(map(str, ROOT.glob("build/cp*")))  # an installation that would be found before the folder
    result = outcome_of(*run(command, folder, NUMBA_CACHE_DIR=str(folder / "numba"), MESONPY_EDITABLE_SKIP=editable))
    (FOLDER / f"{mutant.name}.log").write_text(result.log)
    shutil.rmtree(folder)
    return result


def unchanged(mutants: Iterable[Mutant]) -> list[Mutant]:
    """What is built and tested in the same way, but not changed: there every test must pass."""
    tests: dict[tuple[str, str], dict[str, None]] = {}
    for mutant in mutants:
        where = mutant.path if "numba_cpu" in mutant.path else mutant.path.split("/")[0]
        tests.setdefault((where, expression_for(mutant.path)), {}).update(dict.fromkeys(mutant.tests))
    return [
        Mutant(f"unchanged-{i}", path, "", "", "", tuple(names)) for i, ((path, _), names) in enumerate(tests.items())
    ]


def print_table(outcomes: Iterable[tuple[Mutant, Outcome]], write: Callable[[str], object] = print) -> None:
    write("| mutant | what is wrong | noticed by |")
    write("|---|---|---|")
    for mutant, outcome in outcomes:
        noticed_by = f"`{outcome.noticed_by}`" if outcome.noticed_by else "**nothing**"
        write(f"| {mutant.name} (`{Path(mutant.path).name}`) | {mutant.breaks} | {noticed_by} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="mutants; all, and the unchanged package, if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    arguments = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    if unknown := set(arguments.names) - {mutant.name for mutant in mutants}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    modules, tier = extension_modules(), best_tier()
    print(f"Tier {tier}; logs are in {FOLDER}", file=sys.stderr)

    def try_one(mutant: Mutant) -> Outcome:
        begin = monotonic()
        outcome = try_mutant(mutant, modules, tier)
        print(f"{monotonic() - begin:5.0f} s  {mutant.name}: {outcome.noticed_by}", file=sys.stderr, flush=True)
        return outcome

    references = [] if arguments.names else unchanged(mutants)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        outcomes = list(pool.map(try_one, [*references, *mutants]))
    failures = [outcome.noticed_by for outcome in outcomes[: len(references)] if outcome.noticed_by]
    if failures:
        print(f"Tests fail without any change: {', '.join(failures)}", file=sys.stderr)
        return 1
    noticed = outcomes[len(references) :]
    print_table(zip(mutants, noticed, strict=True))
    return int(any(outcome.noticed_by is None for outcome in noticed))


if __name__ == "__main__":
    sys.exit(main())
