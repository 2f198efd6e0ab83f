"""What a run tells: events and metrics in files, the terminal while it goes on, a report afterwards.

Light on purpose: nothing here imports torch or Ray, and matplotlib only once a report is drawn.
"""
