"""What runs pipelines: ties a generator, an embedder and a retriever together."""
