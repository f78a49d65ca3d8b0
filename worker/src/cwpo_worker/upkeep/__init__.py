"""Maintenance of an installation: reconciliation and retention."""
