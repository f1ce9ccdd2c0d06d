"""Discovery methods other than the training of masks."""
