"""Where every random number of a run comes from: named streams, numbered draws, no hidden state.

A generator is seeded afresh from (seed, stream, index) whenever it is used, so that a resumed run, a rerun and every
rank know their own numbers without a saved generator state. Seeds of one run never collide: the stream's base is a hash,
and draws count up from it.
"""

import hashlib

import torch

SEED_SPACE = 2**32  # the CPU generator (mt19937) looks at 32 bits of its seed


def stream_seed(seed: int, stream: str, index: int = 0) -> int:
    """The 32-bit seed of draw `index` of the named stream; distinct for distinct indices of one stream."""
    base = int.from_bytes(hashlib.blake2s(f"{seed}:{stream}".encode(), digest_size=4).digest(), "little")
    return (base + index) % SEED_SPACE


def generator_for(seed: int, stream: str, index: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator on `device`, seeded for draw `index` of the named stream."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, stream, index))
