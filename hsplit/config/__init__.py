"""Configuration of a run, read from YAML and checked.

Nothing here imports torch, Ray or transformers, so that wrong input is refused at once.
"""

from hsplit.config.cluster import (
    SCHEDULER,
    SERVER,
    BudgetChange,
    ClientConfig,
    ClientGroup,
    Distribution,
    HolderConfig,
    ScheduledChange,
    ServerConfig,
)
from hsplit.config.job import DataSpec, Job, Partition, Privacy, ResidualConfig, Validation
from hsplit.config.policy import DEFAULT_POLICY, Importance, Objective, Pace, Policy, Replan, SelfPruning
from hsplit.config.reading import find_preset, preset_directory, read_yaml, to_yaml
from hsplit.config.run import RunConfig, load_run_config

__all__ = [
    "DEFAULT_POLICY",
    "SCHEDULER",
    "SERVER",
    "BudgetChange",
    "ClientConfig",
    "ClientGroup",
    "DataSpec",
    "Distribution",
    "HolderConfig",
    "Importance",
    "Job",
    "Objective",
    "Pace",
    "Partition",
    "Policy",
    "Privacy",
    "Replan",
    "ResidualConfig",
    "RunConfig",
    "ScheduledChange",
    "SelfPruning",
    "ServerConfig",
    "Validation",
    "find_preset",
    "load_run_config",
    "preset_directory",
    "read_yaml",
    "to_yaml",
]
