"""Command-line programs, one file each; tetdist_command.py starts them."""
