"""Text in, token rows out: sources, binidx files, the order in which rows are learned."""
