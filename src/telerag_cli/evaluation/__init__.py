"""Measures how good the answers and the passages of runs are, and whether two runs differ."""
