"""Monitoring of the service: metrics, logs, traces and confidence drift."""
