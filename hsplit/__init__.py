"""hsplit: unequal devices fine-tune a large language model together, split between them and a server, on Ray.

``hsplit.launch("cluster/hetero.yaml")`` is what the command line calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsplit.home import make_home_usable

__version__ = "0.1.0"

# Before any library reads these variables, in workers on other nodes too.
make_home_usable()

if TYPE_CHECKING:
    from hsplit.api import Run, change_budget, join, launch, leave, plan, resume
    from hsplit.evaluation.evaluate import evaluate
    from hsplit.exporting.export import export
    from hsplit.measuring.measured_budgets import measure_budgets
    from hsplit.observe.watch import watch

__all__ = [
    "Run",
    "__version__",
    "change_budget",
    "evaluate",
    "export",
    "join",
    "launch",
    "leave",
    "measure_budgets",
    "plan",
    "resume",
    "watch",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line shows --help without importing torch and Ray.
    if name in ("Run", "change_budget", "join", "launch", "leave", "plan", "resume"):
        from hsplit import api

        return getattr(api, name)
    if name == "measure_budgets":
        from hsplit.measuring import measured_budgets

        return measured_budgets.measure_budgets
    if name == "export":
        from hsplit.exporting.export import export

        return export
    if name == "evaluate":
        from hsplit.evaluation import evaluate

        return evaluate.evaluate
    if name == "watch":
        from hsplit.observe.watch import watch

        return watch
    raise AttributeError(f"module 'hsplit' has no attribute {name!r}")
