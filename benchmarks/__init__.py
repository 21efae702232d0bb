"""Ratios against a bare baseline in the same run: `python -m benchmarks [NAME ...]`. Absolute times are not results."""
