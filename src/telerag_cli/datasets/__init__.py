"""Public datasets: where they are, getting them, and turning them into what the other commands read."""
