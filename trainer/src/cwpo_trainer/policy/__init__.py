"""The strong model: SFT, CW-PO, online rounds."""
