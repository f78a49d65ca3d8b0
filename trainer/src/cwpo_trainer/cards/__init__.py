"""Model cards: the README.md of a trained model, made from what its run recorded."""
