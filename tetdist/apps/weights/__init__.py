"""Conversion of other libraries' weights, and export of trained networks."""
