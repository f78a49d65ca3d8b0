"""The machine that models compute on: its devices, cores and memory."""
