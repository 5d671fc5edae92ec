"""The tasks: how a text becomes a prompt or a head, and how its answer is scored."""
