"""Random streams as arithmetic: a draw's seed follows from what it is for, so nothing is stored to resume."""

import hashlib


def stream_seed(*purpose: object) -> int:
    """A 63-bit seed for one purpose, e.g. `stream_seed(seed, "order", agent, epoch)`; equal on every machine."""
    digest = hashlib.blake2b(repr(purpose).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def graph_seed(seed: int) -> int:
    """The seed of a run's random topology, in NumPy's range."""
    return stream_seed(seed, "graph") % 2**32


def fault_seed(seed: int) -> int:
    """The seed of a run's broken links and absent agents, in NumPy's range."""
    return stream_seed(seed, "faults") % 2**32
