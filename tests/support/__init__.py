"""What tests share: brute force, tiny models, damaged files, interrupts."""
