"""Measures of annotators and of aligned policies."""
