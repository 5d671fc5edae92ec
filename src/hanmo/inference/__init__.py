"""Inference: the engine that turns prompts into tokens, and its sampling rules."""
