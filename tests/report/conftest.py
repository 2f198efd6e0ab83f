"""The plans and runs' directories of the observers' tests."""

from tests.observe.conftest import fake_run, other_plan, plan

__all__ = ["fake_run", "other_plan", "plan"]
