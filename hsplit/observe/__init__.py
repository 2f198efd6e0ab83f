"""Observation of a run: events and tables in files, displays in the terminal, logs, Prometheus.

Light on purpose: importing any module of it imports neither torch nor Ray.
"""
