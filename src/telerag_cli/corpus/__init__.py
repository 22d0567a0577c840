"""Passages: reading them from files, cutting them up, keeping them with their embeddings."""
