"""Measures what planning needs, on this machine, index and model."""
