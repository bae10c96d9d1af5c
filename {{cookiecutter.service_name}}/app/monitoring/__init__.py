"""How inputs and predictions move, and how often predictions are right."""
