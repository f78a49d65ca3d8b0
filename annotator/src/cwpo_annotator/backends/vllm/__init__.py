"""Scores by a vLLM server."""
