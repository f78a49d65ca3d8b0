"""Ways to train an annotator on human labels."""
