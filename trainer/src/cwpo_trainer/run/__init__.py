"""One run of a command: its process, output folder and log, its interruption and resumption."""
