"""Measurements of the server against a C server on the plain library, in one run, as ratios: `python -m benchmarks`."""
