"""How the method runs: a policy file, one row of METHOD.md section 7."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hsplit.config.section import AnyText, Count, Name, Section, meaning, refuse, shown

DEFAULT_POLICY = "hsplitlora"

_Split = Annotated[
    Literal["planned", "uniform"] | Annotated[int, Field(ge=0, le=10**6)],
    meaning("'planned', 'uniform' or a number of layers from 0"),
]
_Ranks = Annotated[Literal["importance", "uniform"] | Count, meaning("'importance', 'uniform' or a rank of at least 1")]


_Share = Annotated[float, Field(ge=0, le=1)]


class Importance(Section):
    """How it is found out which weights matter (METHOD.md section 3)."""

    metric: Literal["rngwp", "equal"] = Field(
        default="rngwp",
        description="`rngwp` probes gradients at each round's end; `equal` takes all parameters alike",
    )
    tokens: Count = Field(default=64, description="supervised tokens of one client's probe, at most those of a batch")
    lam_0: _Share = Field(default=0.9, description="trust in the newest probe at the run's start, falling to its end")
    lam_min: _Share = Field(default=0.1, description="the least trust in the newest probe")


class Replan(Section):
    """When a new plan is made at a round's end (METHOD.md section 5)."""

    tau: Annotated[float | None, meaning("a number from 0 to 2, or null")] = Field(
        default=0.1, ge=0, le=2, description="L1 distance that normalized importance must have moved; null = never"
    )
    min_rounds: Count = Field(default=1, description="rounds that a plan stays, unless it no longer fits")
    measured: bool = Field(
        default=True, description="whether a client that measured more than it declared is given less to hold"
    )


class Policy(Section):
    """The choices that tell one published method from another; the defaults are HSplitLoRA's."""

    name: Name = Field(default=DEFAULT_POLICY, description="the policy's name; by default the file's, less .yaml")
    description: AnyText = Field(default="", description="what it is, in a sentence")
    placement: Literal["split"] = Field(default="split", description="where the model is: split, client and server")
    split: _Split = Field(
        default="planned",
        description="layers on a client: `planned` for each, `uniform` (what the weakest fits), or a number",
    )
    ranks: _Ranks = Field(
        default="importance",
        description="LoRA rank of a weight: by `importance` and holder, `uniform` (one for all), or a number",
    )
    aggregation: Literal["concat", "fedavg"] = Field(
        default="concat",
        description="`concat` sums the products without error; `fedavg` averages the factors",
    )
    reinit: Literal["random", "svd"] = Field(
        default="svd",
        description="what adapters restart with after `concat`: fresh, or the update's leading part",
    )
    moments: Literal["drop", "keep"] = Field(
        default="drop", description="whether the optimizer's moments outlive an aggregation"
    )
    init: Literal["shared", "independent"] = Field(
        default="independent", description="whether all holders of a weight draw the same initial A"
    )

    importance: Importance = Field(default=Importance(), description="which weights matter")
    replan: Replan = Field(default=Replan(), description="when a new plan is made")

    @property
    def probes(self) -> bool:
        """Whether a run has to measure importance: some plan depends on it."""
        return self.importance.metric != "equal" and (self.ranks == "importance" or self.split == "planned")

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.aggregation == "fedavg" and self.ranks == "importance":
            raise refuse(
                "fedavg averages factors of equal shape, so it needs one rank for all: set ranks to 'uniform'"
                f" or a number, or aggregation to 'concat' (got ranks {shown(self.ranks)})",
                "aggregation",
            )
        return self
