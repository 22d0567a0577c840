"""placeholder."""


def embed() -> None:
    """Placeholder."""
