"""Text from a model: how a token is drawn, how text comes of tokens, and a conversation."""
