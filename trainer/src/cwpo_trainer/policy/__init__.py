"""The strong model: SFT, CW-PO, online alignment."""
