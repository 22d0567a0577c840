"""Which lists to move to fast memory while the LLM writes, and moving them."""
