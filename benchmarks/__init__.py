"""The asv suite: one module for each question. docs/benchmarks.md says how to run it."""
