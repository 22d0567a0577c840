"""A corpus that needs no file: what the docstrings of some modules of the standard library say."""

import argparse
import contextlib
import functools
import heapq
import inspect
import json
import logging
import random
import statistics
import string
import textwrap

MODULES = (argparse, contextlib, functools, heapq, json, logging, random, statistics, string, textwrap)


def passages():
    """About 150 of them, as dictionaries that `telerag embed` takes."""
    for module in MODULES:
        for name in module.__all__:
            identifier = f"{module.__name__}.{name}"
            text = f"{identifier}\n{inspect.getdoc(getattr(module, name))}"
            yield {"id": identifier, "text": text[:400], "title": identifier, "module": module.__name__}
