"""Simulation: the planner, the cost model and the virtual clock over many clients, without training.

All times are virtual: computed from declared budgets by the :class:`~hsplit.planning.cost.clock.VirtualClock` that runs
use too. Ray-free.
"""
