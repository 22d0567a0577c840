"""Text to vectors: the encoder and the job that embeds a corpus."""
