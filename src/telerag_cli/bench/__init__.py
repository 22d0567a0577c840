"""Benchmarks: what is measured, the systems it is measured on, and reports of it."""
