"""The task queue: RQ on Redis or Valkey."""
