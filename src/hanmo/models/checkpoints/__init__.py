"""Weights of other projects: Hugging Face folders and GGUF files."""
