"""The engine for CPUs, in C++: what it can compute (``decoder.py``), its library, and the form of its weights."""
