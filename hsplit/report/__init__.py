"""Report on finished or unfinished runs: one HTML page from the files of their directories.

Light on purpose: importing it imports neither torch nor Ray, and matplotlib only once a figure is drawn.
"""
