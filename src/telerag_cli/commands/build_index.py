"""placeholder."""


def build_index() -> None:
    """Placeholder."""
