"""Reading triplets, and writing the weighted dataset: row by row, in constant memory."""
