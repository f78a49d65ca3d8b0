"""The cards of models and datasets: a README.md, made from what is known of them."""
