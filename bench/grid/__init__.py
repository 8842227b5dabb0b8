"""The parts of bench/stability.py: patients, recipes, faults, one cell of the grid, and tables."""
