"""placeholder."""


def inspect() -> None:
    """Placeholder."""
