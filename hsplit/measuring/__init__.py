"""Measurement of budgets for a cluster file (``hsplit probe``): compute on the model's layers, free memory, links.

Not to be confused with the importance probe, which scores weights. Only ``budgets.py`` knows Ray's actors.
"""
