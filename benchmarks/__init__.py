"""Experiments: a script each, which runs alone or through ``hsplit bench``; ``common.py`` has their shared parts."""
