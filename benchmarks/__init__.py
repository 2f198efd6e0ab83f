"""Experiments: a script each, which runs alone or through ``hsplit bench``; ``common.py`` has what they share."""
