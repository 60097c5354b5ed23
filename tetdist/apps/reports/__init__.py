"""Figures, pages and tables of the results of runs and evaluations."""
