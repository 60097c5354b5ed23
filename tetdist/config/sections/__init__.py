"""The sections of a configuration, a file each; schema.py puts them together."""
