"""Training: the loss, the schedule, the steps and what happens between them."""
