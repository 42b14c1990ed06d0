"""Training: objectives, one step, the loop, and what is looked at on the way."""
