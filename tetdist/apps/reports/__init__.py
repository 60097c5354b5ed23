"""Figures, pages and tables of what runs and evaluations found."""
