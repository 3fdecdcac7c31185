"""Forms in which RWKV models come: one module for each, with both directions where there are two."""
