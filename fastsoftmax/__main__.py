"""The command line: ``python -m fastsoftmax info`` and ``python -m fastsoftmax bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastsoftmax import _bench, _info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; argparse exits with 2 on an argument it refuses."""
    parser = argparse.ArgumentParser(prog="python -m fastsoftmax", description="Fast softmax for NumPy arrays.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench}")
    info = "report versions, machine, backends and what is forced by the environment"
    commands.add_parser("info", help=info, description=f"{info.capitalize()}.")
    bench = "time every backend beside NumPy, SciPy, torch, onnxruntime, jax and a copy"
    bench_parser = commands.add_parser("bench", help=bench, description=_bench.DESCRIPTION)
    _bench.add_arguments(bench_parser)
    options = parser.parse_args(arguments)
    if options.command == "info":
        print(_info.report())
        return 0
    return _bench.run(options, bench_parser)


if __name__ == "__main__":
    sys.exit(main())
