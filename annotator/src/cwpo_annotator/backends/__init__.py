"""Ways to turn token ids into scores."""
