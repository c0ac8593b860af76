"""User-LLM: contextualize a decoder LLM with embeddings of a user's event history (arXiv 2402.13598)."""

__version__ = "0.1.0"
