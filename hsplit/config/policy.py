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

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.aggregation == "fedavg" and self.ranks == "importance":
            raise refuse(
                "fedavg averages factors of equal shape, so it needs one rank for all: set ranks to 'uniform'"
                f" or a number, or aggregation to 'concat' (got ranks {shown(self.ranks)})",
                "aggregation",
            )
        return self
