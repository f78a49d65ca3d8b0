"""Batch annotation jobs: plan, shard, merge, reconcile."""
