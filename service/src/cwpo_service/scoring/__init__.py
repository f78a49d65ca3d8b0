"""Hosts the annotator, admits requests, and scores them in batches."""
