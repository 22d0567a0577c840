"""telerag: retrieval-augmented generation with lookahead over datastores too large for fast memory."""

__version__ = "0.1.0"

from telerag_cli.system import spin_at_barriers

spin_at_barriers()
