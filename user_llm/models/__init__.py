"""The user encoder, the decoder LLM, and the two joined."""
