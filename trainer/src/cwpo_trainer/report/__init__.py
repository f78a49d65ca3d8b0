"""`cwpo report`: the page and its figures."""
