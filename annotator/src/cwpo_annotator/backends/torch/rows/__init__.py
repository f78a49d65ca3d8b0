"""Texts laid out for a model: packed rows that hold a prompt once, and padded batches."""
