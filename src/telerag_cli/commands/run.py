"""placeholder."""


def run() -> None:
    """Placeholder."""
