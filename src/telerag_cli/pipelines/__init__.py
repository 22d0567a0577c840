"""RAG pipelines, each a short async function that knows nothing of tiers."""
