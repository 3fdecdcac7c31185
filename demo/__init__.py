"""The demo: a corpus and a small base model, made on any machine without a network."""
