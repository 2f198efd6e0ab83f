"""What a machine really has, measured for a cluster file: compute on the model's layers, free memory, its link.

Ray-free, and apart from the importance probe (``hsplit.run.step``), which measures weights.
"""
