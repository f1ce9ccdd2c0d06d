"""A shuffled order of range(size) that is known place by place, and never held as a whole.

1. A place is cut into two halves of its bits, and four rounds of a Feistel network mix them: each
   adds a keyed hash of one half to the other. That is a permutation of all numbers of so many bits,
   whatever the hash.
2. What falls outside of range(size) goes through the network again until it falls inside, which
   leaves a permutation of range(size) (at most four tries in the mean).

Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3 (cycle walking).
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

ROUNDS = 4


@dataclass(frozen=True)
class Order:
    """`order[place]` is the number at that place; each of range(size) comes once."""

    size: int
    seed: int

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"place {index} of an order of {self.size}.")
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
