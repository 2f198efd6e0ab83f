"""Simulation: the planner, the cost model and the virtual clock over many clients, without training.

All times are virtual: what declared budgets come to. Nothing here has a cost model of its own; every second is told by
:class:`~hsplit.planning.cost.clock.VirtualClock`, which a run asks too. Ray-free.
"""
