"""Applications around the core, which never imports them.

A user's mistake raises `UserError` in any of their functions; the commands print its sentence.
"""
