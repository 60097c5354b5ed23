"""The commands, one file each; tetdist_command.py starts them."""
