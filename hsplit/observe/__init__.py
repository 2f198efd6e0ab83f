"""A run as seen from outside: events and tables in files, displays in the terminal, logs, Prometheus.

Light on purpose: importing any of it imports neither torch nor Ray.
"""
