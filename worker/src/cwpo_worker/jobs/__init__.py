"""Jobs: their records, states and operations."""
