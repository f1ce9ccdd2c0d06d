"""A random permutation of range(size), computed index by index without storing it.

1. An index's bits are split in two halves, and four rounds of a Feistel network mix them: each adds
   a keyed hash of one half to the other. This permutes all numbers of that many bits, whatever the
   hash.
2. A result outside range(size) goes through the network again until it falls inside, which gives a
   permutation of range(size) (at most four passes on average).

Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3 (cycle walking).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

ROUNDS = 4


@dataclass(frozen=True)
class Order:
    """`order[index]` is the number at that index; each number of range(size) occurs once."""

    size: int
    seed: int

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of an order of {self.size}.")
        number = self._mixed(index)
        while number >= self.size:
            number = self._mixed(number)
        return number

    def _mixed(self, number: int) -> int:
        bits = max(1, ((self.size - 1).bit_length() + 1) // 2)
        high, low = number >> bits, number & ((1 << bits) - 1)
        for round_ in range(ROUNDS):
            text = f"{self.seed} {round_} {low}".encode()
            key = int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
            high, low = low, (high ^ key) & ((1 << bits) - 1)
        return high << bits | low
