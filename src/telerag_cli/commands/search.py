"""placeholder."""


def search() -> None:
    """Placeholder."""
