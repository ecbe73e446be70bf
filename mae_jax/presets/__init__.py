"""Named recipes, each with its command, cost, expected figure and source."""
