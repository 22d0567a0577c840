"""Scheduling: which queries run together, in what order, and on which replica."""
