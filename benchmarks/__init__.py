"""What the pools cost, and what they survive, beside the others: `make bench`."""
