"""The paper's tables and figures as recipes: commands of ours, and where figures are read."""
