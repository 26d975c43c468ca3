"""How exact is the exponential of the kernels, over every float32 and over many float64: ``make exponential``.

A kernel computes a term, exp(x - offset) / 2**exponent, and what rounding took from it. Here it computes those of whole
blocks of numbers that ascend, each with the reference of a chunk with the block's maximum; they are held against the
exponential in a wider dtype. The section of docs/accuracy.md is made from the file that this writes, so ``--from FILE``
makes it again without measuring.
"""

import argparse
import json
import sys
from collections import defaultdict
from functools import cache, partial
from pathlib import Path

import numpy as np

from fastsoftmax import _info, available_backends
from fastsoftmax.backends import compiled

sys.path.append(str(Path(__file__).parents[1]))  # wherever asv or a new process starts
from benchmarks.accuracy import rewrite, table
from tests.reference import LONG, ulp, wide_for

FULL, MODERATE, COARSE = range(3)  # the enumeration in src_cython/state.pxi

# Up to this size a maximum has no offset; beyond, x - offset is exact and small.
LIMITS = {"float32": 1024.0, "float64": 16384.0}
SPAN = 64.0  # within a block, so that no term leaves the range of its dtype
BLOCK = 2**18  # numbers; what is computed of them stays in cache

# Where float16 and bfloat16 results vanish below a maximum of 0.
COARSE_ENDS = (-18.0, -93.0)

SAMPLES = 4_000_000  # of float64, of each sort

# ln 2 in two parts, of which the first has 32 bits: so many times an exponent are exact in float64.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = LONG("1.908214929270587816144e-10")


def ways(dtype):
    """Return functions (x, largest, terms, residuals) that write the terms of a chunk with this maximum, and return its
    offset and exponent; by name."""
    found = {tier: partial(compiled_terms, tier, FULL) for tier in compiled.tiers()}
    return found | ({"numba": numba_terms(dtype)} if "numba" in available_backends() else {})


def compiled_terms(tier, arithmetic, x, largest, terms, residuals):
    return compiled.load_tier(tier).terms_of(x, largest, arithmetic, terms, residuals)


def coarse_terms(tier, x, largest, terms, residuals):
    """Terms for 16-bit results, of differences from the maximum of a row: the rounding of those is not theirs."""
    return compiled_terms(tier, COARSE, x, 0.0, terms, residuals)


@cache
def numba_terms(dtype):
    import numba

    from fastsoftmax.backends.numba_cpu import registers, terms

    @numba.njit
    def write(x_address, terms_address, residuals_address, n, largest, like):
        x, y = registers.pointer_to(x_address, like), registers.pointer_to(terms_address, like)
        z = registers.pointer_to(residuals_address, like)
        reference = terms.reference_at(registers.group_of(x, largest))
        width = registers.lanes_in(reference.offset)
        for i in range(0, n, width):
            logits = registers.load_first(x, i, n - i, registers.group_of(x, largest))
            term, residual = terms.term_at(logits, reference)
            registers.store_first(y, i, term, n - i)
            registers.store_first(z, i, residual, n - i)
        return registers.lane(reference.offset, 0), registers.lane(terms.exponent_of(reference), 0)

    like = np.dtype(dtype).type(0)
    return lambda x, largest, terms, residuals: write(
        x.ctypes.data, terms.ctypes.data, residuals.ctypes.data, x.size, largest, like
    )


def every_float32(low=-LIMITS["float32"] - 2 * SPAN, high=LIMITS["float32"], block=BLOCK, of=1):
    """Yield all float32 from `low` up to 0, and from there to `high`, in blocks that ascend and share their ends; of so
    many blocks only one."""
    for sign, end in ((2**31, -low), (0, high)):
        end = int(np.float32(end).view(np.uint32))
        for first in range(0, end, block * of):
            x = (np.arange(first, min(first + block, end) + 1, dtype=np.uint32) | np.uint32(sign)).view(np.float32)
            yield x[::-1].copy() if sign else x


def hard_float64(n_samples, seed=0):
    """Yield float64 in blocks that ascend: samples of all sizes, and what is next to where the reduction or the
    rounding of an exponential jumps."""
    rng, limit = np.random.default_rng(seed), LIMITS["float64"]
    steps = rng.choice(int(limit / np.log(2) * 16), min(n_samples, int(limit / np.log(2) * 16)), replace=False)
    jumps = (steps * (LONG(LN2_HIGH) + LN2_LOW) / 16).astype(np.float64)  # half-way between two roots of two, or at one
    small = rng.integers(0, n_samples, n_samples)
    x = [
        rng.uniform(-limit - 4 * SPAN, limit, n_samples),
        rng.uniform(-SPAN, SPAN, n_samples),
        2.0 ** rng.uniform(-70, 6, n_samples) * rng.choice([-1, 1], n_samples),
        *(jumps + step * np.spacing(jumps) for step in range(-2, 3)),
        *(-jumps + step * np.spacing(jumps) for step in range(-2, 3)),
        (2 * small + 1) * 2.0**-53,  # exp(x) is this side of half-way between two numbers, by x**2 / 2
        -(2 * small + 1) * 2.0**-54,
        limit - np.arange(100) * np.spacing(limit / 2),
    ]
    x = np.unique(np.concatenate(x))
    cuts = np.flatnonzero(np.diff(np.floor(x / SPAN))) + 1
    for part in np.split(x, cuts):
        yield from np.array_split(part, -(-part.size // BLOCK))


def exact_terms(x, offset, exponent):
    """Return exp(x - offset) / 2**exponent in a wider dtype, to 2**-9 of an ULP: that of long double in float64."""
    wide = wide_for(x.dtype)
    t, error = two_sum(x.astype(wide) - wide(offset), wide(-exponent * LN2_HIGH))
    t, low_error = two_sum(t, wide(-exponent) * wide(LN2_LOW))
    return np.exp(t) * (1 + (error + low_error))


def two_sum(a, b):
    """Return a + b and its rounding error (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def measure(blocks, ways):
    """Return, by way, the largest error of terms, in ULP and relative, and that of terms with what rounding took from
    them; where the former is; and how many terms are less than the one before."""
    found = defaultdict(lambda: {"max": 0.0, "at": 0.0, "unrounded": 0.0, "relative": 0.0, "decreases": 0, "size": 0})
    for x in blocks:
        references = {}
        terms, residuals = np.empty_like(x), np.zeros_like(x)
        for name, write in ways.items():
            reference = write(x, float(x[-1]), terms, residuals)
            if reference not in references:
                expected = exact_terms(x, *reference)
                references[reference] = expected, ulp(expected, x.dtype)
            expected, unit = references[reference]
            distance = terms - expected
            error = abs(distance) / unit
            worst, one = int(error.argmax()), found[name]
            if error[worst] > one["max"]:
                one["max"], one["at"] = float(error[worst]), float(x[worst])
            one["unrounded"] = max(one["unrounded"], float((abs(distance + residuals) / unit).max()))
            one["relative"] = max(one["relative"], float((abs(distance) / expected).max()))
            one["decreases"] += int((terms[1:] < terms[:-1]).sum())
            one["size"] += x.size
    return dict(found)


def report(document):
    """Return the tables of docs/accuracy.md."""
    lines = []
    for name, one in document["float32"].items():
        cells = [f"{f['max']:.3f} at {f['at']:.6g} | {f['unrounded']:.3f}" for f in (one, document["float64"][name])]
        lines.append([name, *cells, str(one["decreases"] + document["float64"][name]["decreases"])])
    head = ["", "float32 term", "before rounding", "float64 term", "before rounding", "decreases"]
    sizes = [next(iter(document[key].values()))["size"] for key in ("float32", "float64")]
    coarse = [
        [name, *(f"2^{np.log2(document[f'coarse {end}'][name]['relative']):.1f}" for end in COARSE_ENDS)]
        for name in document[f"coarse {COARSE_ENDS[0]}"]
    ]
    parts = [
        f"{sizes[0]:,} float32 and {sizes[1]:,} float64 on {document['machine']['cpu']}, errors in ULP:",
        table(head, lines),
        "Terms for 16-bit results, relative errors over all float32 between the bound and 0:",
        table(["", *(f"from {end:g}" for end in COARSE_ENDS)], coarse),
    ]
    return "\n\n".join(parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="report what such a file holds")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where accuracy.md is [docs]")
    options = parser.parse_args(arguments)
    if options.source:
        document = json.loads(options.source.read_text())
    else:
        document = {"machine": _info.machine(), "versions": _info.versions()}
        document["float32"] = measure(every_float32(), ways("float32"))
        document["float64"] = measure(hard_float64(SAMPLES), ways("float64"))
        coarse = {tier: partial(coarse_terms, tier) for tier in compiled.tiers()}
        document |= {f"coarse {end}": measure(every_float32(end, 0.0), coarse) for end in COARSE_ENDS}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    rewrite(options.folder / "accuracy.md", "make exponential", report(document))


if __name__ == "__main__":
    main()
