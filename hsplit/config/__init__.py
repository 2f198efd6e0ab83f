"""The configuration of a run: who takes part, what is trained and how, read from YAML and checked.

Light on purpose: nothing here imports torch, Ray or transformers, so that wrong input is refused at once.
"""

from hsplit.config.cluster import (
    SCHEDULER,
    SERVER,
    BudgetChange,
    Client,
    ClientSpec,
    Distribution,
    Holder,
    ScheduledChange,
    ServerSpec,
)
from hsplit.config.files import find_preset, preset_directory, read_yaml, to_yaml
from hsplit.config.job import DataSpec, Job, Partition, Privacy, Residual, Validation
from hsplit.config.policy import DEFAULT_POLICY, Importance, Policy, Replan, SelfPruning
from hsplit.config.run import RunConfig, load_run_config

__all__ = [
    "DEFAULT_POLICY",
    "SCHEDULER",
    "SERVER",
    "BudgetChange",
    "Client",
    "ClientSpec",
    "DataSpec",
    "Distribution",
    "Holder",
    "Importance",
    "Job",
    "Partition",
    "Policy",
    "Privacy",
    "Replan",
    "Residual",
    "RunConfig",
    "ScheduledChange",
    "SelfPruning",
    "ServerSpec",
    "Validation",
    "find_preset",
    "load_run_config",
    "preset_directory",
    "read_yaml",
    "to_yaml",
]
