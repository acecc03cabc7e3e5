"""Decisions on rows of which a server lists only the most likely ids."""
