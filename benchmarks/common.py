"""What the benchmarks share: the contenders of ``python -m fastsoftmax bench``, ready to be called."""

from functools import lru_cache

from fastsoftmax._bench import CONTENDERS, parse_case

_by_name = {contender.name: contender for contender in CONTENDERS}
CONTENDER_NAMES = [contender.name for contender in CONTENDERS if contender.kind == "backend"] + ["numpy", "scipy"]


def prepare(name, function, x, axis, n_threads):
    """Return a contender's call; skip the benchmark where there is none."""
    contender = _by_name[name]
    reason = contender.missing()
    call = contender.prepare(function, x, axis, n_threads) if reason is None else None
    if call is None:
        raise NotImplementedError(reason or f"{name} does not apply")
    return call


@lru_cache(maxsize=1)  # asv runs setup before every sample: fresh data and a cold call would be timed with it
def prepare_warm(name, function, shape, dtype, n_threads):
    """Return a contender's call on seeded normals that has run once."""
    case = parse_case(shape, dtype)
    call = prepare(name, function, case.data(), case.axis, n_threads)
    call()
    return call
