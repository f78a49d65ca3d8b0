"""Review by people: which rows they look at, in which form, and what their answers come to."""
