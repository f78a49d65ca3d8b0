"""Scores by models in this process."""
