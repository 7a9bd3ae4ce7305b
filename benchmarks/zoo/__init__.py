"""Every architecture of transformers, tiny and with random weights: sharded, and compared with itself unsharded."""
