"""How good a model is, and whether it is better than another: measures of each item, and intervals of their differences."""
