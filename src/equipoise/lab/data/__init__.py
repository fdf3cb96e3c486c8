"""From text on this machine, or a user's own, to packed batches of token ids."""
