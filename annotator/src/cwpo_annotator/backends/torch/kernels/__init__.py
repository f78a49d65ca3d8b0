"""Faster layers for inference, each compared with the original when a model is loaded."""
