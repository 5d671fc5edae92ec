"""The operations of the networks, each computed in the fastest way this machine has: a native kernel (``native.py``) on
the CPU, torch everywhere else. Both ways give the same values up to rounding, forwards and backwards."""
