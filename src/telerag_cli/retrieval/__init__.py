"""Searching the lists wherever they are: hits at once, misses as they arrive."""
