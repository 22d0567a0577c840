"""The system behind an HTTP server that speaks OpenAI's protocol, and a page to watch it."""
