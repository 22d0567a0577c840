"""telerag: retrieval-augmented generation with lookahead over datastores too large for fast memory."""

__version__ = "0.1.0"
