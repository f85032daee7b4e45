"""Measurements to repeat: `python -m tools.benchmarks.NAME`, JSON on standard output (docs/benchmarks.md)."""
