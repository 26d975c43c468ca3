"""Is fastsoftmax as fast as it is meant to be? Every case beside its target: ``make compare``.

`TARGETS` states the largest ratio that the time of a plain call may have to that of its yardstick: the fastest peer, a
copy of the same bytes, one read of the input. `fastsoftmax._bench` measures, as for ``python -m fastsoftmax bench``,
but in one process for each number of threads and instruction-set tier, for some contenders read theirs only once. The
ratios are printed, never asserted: the exit status is 0 whether they are met or not.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import numpy as np

import fastsoftmax
from fastsoftmax import _bench, _info
from fastsoftmax._bench import CONTENDERS, FUNCTIONS, Case, Contender, Measurement, parse_case

SCIPY, READ = ("scipy", 0.10), ("read", 1.10)

# The largest ratios of a plain call to its yardstick, on one thread and on more: those of softmax and log_softmax, then
# the yardstick and the ratio of logsumexp. Where logsumexp has none, softmax alone is measured.
# fmt: off
TARGETS = (
    # group           dtypes              shapes                                       yardstick  1     more  logsumexp
    ("small-calls",   "float32 float64",  "10 4x10 1000",                              "peer",    0.50, 0.50, SCIPY),
    ("in-cache",      "float32",          "64x1000",                                   "peer",    0.60, 0.60, SCIPY),
    ("in-cache",      "float32",          "100000 333x777",                            "peer",    0.60, 0.45, SCIPY),
    ("in-cache",      "float32",          "1024x1024",                                 "peer",    0.65, 0.45, SCIPY),
    ("in-cache-f64",  "float64",          "64x1000 1024x1024",                         "peer",    0.40, 0.40, SCIPY),
    ("beyond-cache",  "float32",          "8192x4096 100000x128 256x50257",            "copy",    1.20, 1.20, READ),
    ("beyond-cache",  "float64",          "4096x4096",                                 "copy",    1.20, 1.20, READ),
    ("long-row",      "float32",          "10000000",                                  "copy",    1.60, 1.60, READ),
    ("long-row",      "float64",          "5000000",                                   "copy",    1.60, 1.60, READ),
    ("tiny-rows",     "float32 float64",  "1000000x10",                                "copy",    2.00, 2.00, READ),
    ("tiny-rows",     "float32",          "2000000x3 300000x37",                       "copy",    2.00, 2.00, READ),
    ("other-axis",    "float32",          "4096x4096@0 64x100x1000@1 16x21x128x128@1", "copy",    1.50, 1.50, READ),
    ("other-axis",    "float64",          "4096x4096@0",                               "copy",    1.50, 1.50, READ),
    ("fresh-output",  "float32",          "2500x4000",                                 "out=",    1.20, 1.20, None),
    ("fresh-output",  "float32",          "2500x4000",                                 "peer",    1.00, 1.00, None),
    ("low-precision", "float16 bfloat16", "1024x1024 1024x1024@0",                     "native",  1.00, 1.00, None),
    ("low-precision", "float16 bfloat16", "8192x4096 8192x4096@0",                     "native",  1.00, 1.00, None),
    ("low-precision", "float16 bfloat16", "8192x4096 8192x4096@0",                     "copy",    1.30, 1.30, None),
    ("tier-v3",       "float32",          "64x1000 1024x1024 100000 333x777",          "AVX2",    0.60, 0.60, None),
    ("tier-v3",       "float64",          "64x1000 1024x1024",                         "AVX2",    0.60, 0.60, None),
)
# fmt: on
IMPORT_SECONDS = 15e-3  # what `import fastsoftmax` may take where NumPy is loaded already

GROUPS = (*dict.fromkeys(group for group, *_ in TARGETS), "import")

# A yardstick is the fastest of some contenders.
PEERS = ("numpy", "scipy", "torch", "onnxruntime", "jax")
YARDSTICKS = {
    "peer": PEERS,
    "AVX2": tuple(name for name in PEERS if name != "onnxruntime"),  # it cannot be held to AVX2
    "native": ("torch", "onnxruntime"),
    "scipy": ("scipy",),
    "copy": ("copy:numpy", "copy:torch"),
    "read": ("read:numpy", "read:torch"),
    "out=": ("fastsoftmax:out=",),
}

IMPORT_PROCESSES = 15

# --quick: one short turn for each contender that a target names, and no function but softmax.
QUICK_ROUNDS, QUICK_TURN_SECONDS = 1, 10e-3


class Job(NamedTuple):
    """One measurement: what is computed, on how many threads, on which tier (None: the best), with or without out=."""

    function: str
    case: Case
    n_threads: int
    tier: str | None
    fresh: bool


class Question(NamedTuple):
    """What one line of the table answers: is a job done within ``limit`` times its yardstick?"""

    group: str
    job: Job
    yardstick: str
    limit: float


@dataclass(frozen=True)
class Answer:
    """One line of the table; times in seconds, NaN where there is none.

    ``against`` is the contender that the yardstick comes from, ``peer`` the fastest of the peers.
    """

    group: str
    function: str
    case: str
    n_threads: int | None
    yardstick: str
    limit: float
    ours: float
    against: str | None
    against_seconds: float
    peer: str | None
    peer_seconds: float
    served_by: str
    remark: str

    @property
    def ratio(self):
        return self.ours / self.against_seconds

    @property
    def verdict(self):
        return "unmeasured" if np.isnan(self.ratio) else "met" if self.ratio <= self.limit else "missed"


def questions(groups, functions, threads):
    """List what the table answers, in its order."""
    found = []
    for group in groups:
        for function in functions:
            for _, dtypes, shapes, *mapping, reducing in (target for target in TARGETS if target[0] == group):
                if reducing is None and function != "softmax":
                    continue
                for dtype in dtypes.split():
                    for shape in shapes.split():
                        for n_threads in threads:
                            yardstick, ratio, ratio_threads = mapping
                            limit = ratio if n_threads == 1 else ratio_threads
                            if function == "logsumexp":
                                yardstick, limit = reducing
                            tier = "x86_64_v3" if group == "tier-v3" else None
                            case = parse_case(shape, dtype)
                            job = Job(function, case, n_threads, tier, group == "fresh-output")
                            found.append(Question(group, job, yardstick, limit))
    return found


def prepare_plain(function, x, axis, n_threads):
    """Prepare a call of this package that allocates its result."""
    os.environ["FASTSOFTMAX_NUM_THREADS"] = str(n_threads)
    return partial(getattr(fastsoftmax, function), x, axis=axis)


def prepare_numpy_fresh(function, x, axis, n_threads):
    def softmax():
        terms = np.exp(x - x.max(axis=axis, keepdims=True))
        return np.divide(terms, terms.sum(axis=axis, keepdims=True), out=terms)

    return softmax


def prepare_torch_fresh(function, x, axis, n_threads):
    import torch

    torch.set_num_threads(n_threads)
    return partial(getattr(torch, function), _bench.as_tensor(x), axis)


def prepare_onnxruntime_fresh(function, x, axis, n_threads):
    session = _bench.onnx_session(function, x, axis, n_threads)
    return lambda: session.run(None, {"x": x})[0]


def prepare_numpy_read(function, x, axis, n_threads):
    return x.reshape(-1).max


def prepare_torch_read(function, x, axis, n_threads):
    import torch

    torch.set_num_threads(n_threads)
    return partial(torch.sum, _bench.as_tensor(x))


@cache
def contenders(fresh):
    """Return all contenders by name: with an output to write to, or each with one of its own making."""
    known = {contender.name: contender for contender in CONTENDERS}
    here, needs_torch = known["numpy"].missing, known["torch"].missing
    with_output = Contender("fastsoftmax", "backend", here, partial(_bench.prepare_fastsoftmax, None))
    if fresh:
        added = (
            Contender("fastsoftmax", "backend", here, prepare_plain),
            Contender("fastsoftmax:out=", "backend", here, with_output.prepare),
            Contender("numpy", "peer", here, prepare_numpy_fresh),
            Contender("torch", "peer", needs_torch, prepare_torch_fresh),
            Contender("onnxruntime", "peer", known["onnxruntime"].missing, prepare_onnxruntime_fresh),
        )
    else:
        added = (
            with_output,
            Contender("read:numpy", "read", here, prepare_numpy_read),
            Contender("read:torch", "read", needs_torch, prepare_torch_read),
        )
    return known | {contender.name: contender for contender in added}


@cache
def worker(n_threads, tier):
    """Start the process that measures on so many threads and, but for onnxruntime, with the instructions of a tier."""
    environment = {}
    if tier:
        found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())
        environment = {
            "FASTSOFTMAX_ISA": tier,
            "ATEN_CPU_CAPABILITY": "avx2",
            "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
            "NPY_DISABLE_CPU_FEATURES": " ".join(name for name in found if name.startswith(("AVX512", "X86_V4"))),
        }
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with mock.patch.dict(os.environ, environment):
        executor.submit(os.getpid).result()  # starts it
    return executor


def missing():
    """Return why some contenders are not measured, in a worker: finding out imports them."""
    reasons = {contender.name: contender.missing() for contender in contenders(False).values()}
    return {name: reason for name, reason in reasons.items() if reason and not name.startswith("fastsoftmax")}


def measure(job, names, n_rounds, turn_seconds, title):
    """Do a job, in a worker."""
    chosen = [one for name, one in contenders(job.fresh).items() if name in names and one.missing() is None]
    with _bench.show_progress(title) as progress:
        return _bench.measure(job.function, job.case, chosen, job.n_threads, n_rounds, progress, turn_seconds)


def names_for(job, asked, quick):
    """Return the contenders that a job takes: those its questions need, and the peers unless they would hold it up."""
    names = {"fastsoftmax"}.union(*(YARDSTICKS[question.yardstick] for question in asked if question.job == job))
    # NumPy and SciPy compute 16-bit floats one by one: 16 ms for 1024x1024, where torch takes 0.5.
    return names if quick or job.case.numpy_dtype.itemsize == 2 else names.union(PEERS)


def fastest(measurement, names):
    """Return the fastest of some contenders and its time; None and NaN if none was timed."""
    times = {name: timing.median for name, timing in measurement.timings.items() if name in names}
    name = min(times, key=times.get, default=None)
    return name, times.get(name, float("nan"))


def answer(question, result):
    """Compare a measurement, or the message of one that failed, with what is asked for."""
    group, job, yardstick, limit = question
    asked = (group, job.function, f"{job.case.dtype} {job.case}", job.n_threads, yardstick, limit)
    if not isinstance(result, Measurement):
        return Answer(*asked, float("nan"), None, float("nan"), None, float("nan"), "", result)
    _, ours = fastest(result, ("fastsoftmax",))
    remarks = [f"{name} {reason.partition(':')[0]}" for name, reason in result.excluded.items()]
    if yardstick == "AVX2" and (other := result.timings.get("onnxruntime")):
        remarks.append(f"onnxruntime, not held to AVX2: {ours / other.median:.2f}")
    plan = result.plans.get("fastsoftmax", result.choice)
    compared = fastest(result, YARDSTICKS[yardstick]) + fastest(result, YARDSTICKS["AVX2"] if job.tier else PEERS)
    return Answer(*asked, ours, *compared, _bench.describe(plan), ", ".join(remarks))


def import_seconds():
    """Return what importing the package takes where NumPy is loaded, once for each of some processes."""
    code = "from time import perf_counter as now; import numpy; start = now(); import fastsoftmax; print(now() - start)"
    # An editable install asks ninja first whether anything must be rebuilt: 12 ms that no user waits for.
    builds = [finder._build_path for finder in sys.meta_path if hasattr(finder, "_build_path")]
    environment = os.environ | {"MESONPY_EDITABLE_SKIP": os.pathsep.join(builds)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # the first import compiles the sources, and later ones need not
    command = [sys.executable, "-c", code]
    return [float(subprocess.check_output(command, env=environment)) for _ in range(IMPORT_PROCESSES)]


def answer_import(seconds):
    """Compare the time of the import with its target."""
    nothing = (None, float("nan"))
    return Answer(
        "import", "", "import", None, "15 ms", 1.0, median(seconds), "15 ms", IMPORT_SECONDS, *nothing, "", ""
    )


# Each column's heading, its width, and what stands in it.
COLUMNS = (
    ("function", 11, lambda one: one.function),
    ("case", 23, lambda one: one.case),
    ("threads", 7, lambda one: one.n_threads or ""),
    ("us", 9, lambda one: _bench.microseconds(one.ours)),
    ("against", 16, lambda one: one.against or one.yardstick),
    ("us", 9, lambda one: _bench.microseconds(one.against_seconds)),
    ("ratio", 6, lambda one: f"{one.ratio:.2f}"),
    ("target", 6, lambda one: f"{one.limit:.2f}"),
    ("", 10, lambda one: one.verdict),
    ("fastest peer timed", 18, lambda one: f"{one.ours / one.peer_seconds:.2f} {one.peer}" if one.peer else ""),
    ("served by", 49, lambda one: one.served_by),
    ("remark", 18, lambda one: one.remark),
)


def line(cells):
    """Return a line of a Markdown table in which columns line up."""
    return "| " + " | ".join(f"{cell:<{width}}" for cell, (_, width, _) in zip(cells, COLUMNS, strict=True)) + " |"


def header(group):
    names, widths = [name for name, _, _ in COLUMNS], [width for _, width, _ in COLUMNS]
    return f"\n### {group}\n\n{line(names)}\n|{'|'.join('-' * (width + 2) for width in widths)}|"


def summary(answers):
    """Return how many targets are met and missed, by group and function, and where a peer is ahead."""
    counts = Counter((one.group, one.function, one.verdict) for one in answers)
    lines = ["\n### summary\n", "| group | function | met | missed | unmeasured |", "|---|---|---|---|---|"]
    for group, function in dict.fromkeys((one.group, one.function) for one in answers):
        verdicts = [counts[group, function, verdict] for verdict in ("met", "missed", "unmeasured")]
        lines.append(f"| {group} | {function} | {' | '.join(map(str, verdicts))} |")
    ahead = dict.fromkeys(
        f"- {one.group}, {one.function} {one.case} on {one.n_threads}: {one.peer} {one.peer_seconds / one.ours:.2f}"
        for one in answers
        if one.peer_seconds < one.ours
    )
    return "\n".join([*lines, "\nWhere a peer is ahead, with its time over ours:\n", *(ahead or ["- nowhere"])])


def commit():
    """Return the commit of the source tree, and whether it was changed; None outside of a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def threads_list(text):
    return tuple(_bench.positive_integer(one) for one in text.split(","))


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=_bench.list_of(GROUPS), default=GROUPS, help=f"of {', '.join(GROUPS)} [all]")
    parser.add_argument("--function", type=_bench.list_of(FUNCTIONS), help=f"of {', '.join(FUNCTIONS)} [all]")
    parser.add_argument("--threads", type=threads_list, default=(1, 2), help="numbers of threads, such as 1,2 [1,2]")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a rough table in about two minutes: one short turn, softmax unless --function says more, no contenders "
        "but those that targets name",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, versions and all figures")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse_arguments(arguments)
    functions = options.function or (FUNCTIONS[:1] if options.quick else FUNCTIONS)
    budget = (QUICK_ROUNDS, QUICK_TURN_SECONDS) if options.quick else (_bench.ROUNDS, _bench.TURN_SECONDS)
    machine, versions = _info.machine(), _info.versions()
    print(_bench.introduction(machine, versions, " and ".join(map(str, options.threads))))
    for name, reason in worker(options.threads[0], None).submit(missing).result().items():
        print(f"not measured: {name}: {reason}")

    asked = questions(options.groups, functions, options.threads)
    results, answers, imports = {}, [], []
    for number, question in enumerate(asked):
        group, job = question.group, question.job
        if not answers or answers[-1].group != group:
            print(header(group), flush=True)
        if job not in results:
            title = f"[{number + 1}/{len(asked)}] {job.function} {job.case.dtype} {job.case} on {job.n_threads}"
            names = names_for(job, asked, options.quick)
            try:
                results[job] = worker(job.n_threads, job.tier).submit(measure, job, names, *budget, title).result()
            except Exception as error:  # a case that cannot be measured is a line of the table, too
                results[job] = f"{type(error).__name__}: {error}"
                if isinstance(error, BrokenExecutor):
                    worker.cache_clear()
        answers.append(answer(question, results[job]))
        print(line([content(answers[-1]) for _, _, content in COLUMNS]), flush=True)
    if "import" in options.groups:
        imports = import_seconds()
        answers.append(answer_import(imports))
        print(header("import"), line([content(answers[-1]) for _, _, content in COLUMNS]), sep="\n")
    print(summary(answers), "\n")
    measurements = {job: result for job, result in results.items() if isinstance(result, Measurement)}
    for reason in dict.fromkeys(
        f"{name}: {job.function} {job.case.dtype} {job.case}: {reason}"
        for job, measurement in measurements.items()
        for name, reason in measurement.excluded.items()
    ):
        print(f"not timed: {reason}")
    if options.json:
        document = {
            "commit": commit(),
            "machine": machine,
            "versions": versions,
            "parameters": {"threads": options.threads, "n_rounds": budget[0], "turn_seconds": budget[1]},
            "answers": [asdict(one) | {"ratio": one.ratio, "verdict": one.verdict} for one in answers],
            "measurements": [
                {"tier": job.tier, "fresh": job.fresh} | asdict(measurement)
                for job, measurement in measurements.items()
            ],
            "import_seconds": imports,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
