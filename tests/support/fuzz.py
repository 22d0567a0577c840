"""How much is fuzzed: a little in every run of the tests, ``TELERAG_FUZZ=10000`` for a campaign."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("TELERAG_FUZZ", "200"))

fuzzed = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
