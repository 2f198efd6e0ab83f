"""A policy file: the variant of the method, one row of METHOD.md section 7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hsplit.config.section import (
    REFERENCE,
    AnyText,
    Count,
    Name,
    NonNegative,
    Section,
    is_reference,
    meaning,
    refuse,
    shown,
)

DEFAULT_POLICY = "hsplitlora"

_Reference = Annotated[str, Field(pattern=REFERENCE)]
_OWN = "package.module:name"


_Split = Annotated[
    Literal["planned", "uniform"] | Annotated[int, Field(ge=0, le=10**6)] | _Reference,
    meaning(f"'planned', 'uniform', a number of layers from 0, or {_OWN}"),
]
_Ranks = Annotated[
    Literal["importance", "budget", "uniform"] | Count | _Reference,
    meaning(f"'importance', 'budget', 'uniform', a rank of at least 1, or {_OWN}"),
]
_AGGREGATIONS = Literal["concat", "fedavg", "hetlora", "flexlora", "raflora", "florist", "fedplora", "none"]
_Aggregation = Annotated[
    _AGGREGATIONS | _Reference,
    meaning(f"'concat', 'fedavg', 'hetlora', 'flexlora', 'raflora', 'florist', 'fedplora', 'none', or {_OWN}"),
]
_Metric = Annotated[
    Literal["rngwp", "spectral", "equal"] | _Reference, meaning(f"'rngwp', 'spectral', 'equal', or {_OWN}")
]


_Share = Annotated[float, Field(ge=0, le=1)]


class Importance(Section):
    """Measuring the importance of weights (METHOD.md section 3)."""

    metric: _Metric = Field(
        default="rngwp",
        description="`rngwp` (gradient-weight products) and `spectral` (singular values of gradients) are probed at"
        " rounds' ends; `equal` takes all parameters alike; or your own",
    )
    tokens: Count = Field(default=64, description="supervised tokens of one client's probe, at most those of a batch")
    back_off: bool = Field(
        default=True, description="whether the next probe waits twice as many rounds where this one has changed little"
    )
    lam_0: _Share = Field(default=0.9, description="trust in the newest probe at the run's start, falling to its end")
    lam_min: _Share = Field(default=0.1, description="the least trust in the newest probe")

    @property
    def spectral(self) -> bool:
        """True if a probe finds spectra and not sums."""
        return self.metric == "spectral"


class Replan(Section):
    """Conditions for a new plan at a round's end (METHOD.md section 5)."""

    tau: Annotated[float | None, meaning("a number from 0 to 2, or null")] = Field(
        default=0.1, ge=0, le=2, description="L1 distance that normalized importance must have moved; null = never"
    )
    min_rounds: Count = Field(default=1, description="rounds that a plan stays, unless it no longer fits")
    measured: bool = Field(
        default=True, description="whether a client that measured more than it declared is given less to hold"
    )


class SelfPruning(Section):
    """Removal of directions that a holder does not need, as in HetLoRA, until the next plan sets ranks again."""

    decay: float = Field(default=0.99, gt=0, lt=1, description="part of its rank that a holder keeps when it prunes")
    penalty: NonNegative = Field(default=5e-3, description="weight of the trailing directions' size in the loss")


class Pace(Section):
    """Ways to keep holders from waiting for one another (METHOD.md section 10); all off is a method as published."""

    batch_size: Literal["equal", "planned"] = Field(
        default="equal",
        description="examples that a client brings to a step: `job.batch_size` each, or `planned` for each by its"
        " budget, with the same sum",
    )
    min_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="with `batch_size` planned: a client's share of the examples is at least this part of its share of"
        " the data",
    )
    weights: Literal["tokens", "data"] = Field(
        default="tokens",
        description="weight of a client's loss: by its `tokens`, or by its share of the `data` whatever it brings (at"
        " most 4 times its tokens')",
    )
    periods: Annotated[Literal["none", "planned"] | Count, meaning("'none', 'planned' or a number of groups")] = Field(
        default="none",
        description="`planned`: clients come to the server in groups, in turn, so that it computes for some while"
        " others compute and send, and a slow client may sit out whole steps; a number: so many groups; `none`: all"
        " wait for all",
    )
    ahead: bool = Field(
        default=False,
        description="with `periods`: whether a client computes its next batch before the gradient of the one under way"
        " is there, so that its own layers learn from gradients at its adapters of one step before; holds a second"
        " batch and a second copy of the adapters",
    )
    server_step: Literal["cycle", "group"] = Field(
        default="cycle",
        description="when the server steps its own adapters: once all groups have had their turn (as without groups, to"
        " rounding), or at each `group`",
    )
    stored: Literal["dense", "codes", "planned"] = Field(
        default="dense",
        description="how a client stores an int8 or NF4 base: `dense`, as `codes` (a third of the memory, but its"
        " weights are dequantized in every pass), or `planned` for each",
    )
    embedding: Literal["whole", "own"] = Field(
        default="whole",
        description="rows of the embedding that a client without the tail reads: the `whole`, or those that its `own`"
        " texts use (`hsplit plan`, which reads no texts, counts it whole)",
    )
    wire: Literal["job", "planned"] = Field(
        default="job",
        description="format of a client's messages: `job.wire`, or `planned`: a narrower one where its link binds",
    )
    exchange: Literal["whole", "compute"] = Field(
        default="whole",
        description="adapters at a round's end: sent `whole`, as they are trained, or rounded by their holder to the"
        " type to `compute` in (`job.dtype`), with bf16 in half the time; what is aggregated, and what holders restart"
        " with, are the rounded ones, exactly",
    )
    residual_wait: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="part of a weight's aggregated adapters (relative Frobenius norm) that holders may lack of its"
        " residual, until it is more or the last round is done; what was lacking is reported, and the store is exact in"
        " any case; 0 = every change is sent at once",
    )


class Objective(Section):
    """The constants of what plans maximize, ``learning ** gamma`` a second (METHOD.md section 5).

    ``hsplit bench capacity`` measures them. The defaults are not measured: all that is learned counts in full.
    """

    gamma: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="exponent of what a plan learns by: below 1, speed counts for more than ranks and trained layers",
    )
    rho: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="exponent of what a rank captures, `log2(1 + rank) ** rho`: below 1, how much of the model is"
        " trained counts for more than at which ranks",
    )
    kappa: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="discount of a layer that several holders train apart: their learning counts by the sum of their"
        " squared shares of tokens to the power of `kappa`",
    )


class Policy(Section):
    """The choices by which published methods differ; the defaults are HSplitLoRA's."""

    name: Name = Field(default=DEFAULT_POLICY, description="the policy's name; by default the file's, less .yaml")
    description: AnyText = Field(default="", description="what it is, in a sentence")
    placement: Literal["split", "full", "single"] = Field(
        default="split",
        description="where the model is: `split` over client and server, in `full` on each client, or on a `single`"
        " node (the server's) with everybody's data",
    )
    train: Literal["adapters", "weights"] = Field(
        default="adapters", description="what is trained: LoRA `adapters`, or all `weights` (on a single node)"
    )
    split: _Split = Field(
        default="planned",
        description="layers on a client: `planned` for each, `uniform` (what the weakest fits), a number, or your own"
        " rule; only for placement `split`",
    )
    ranks: _Ranks = Field(
        default="importance",
        description="LoRA rank of a weight: by `importance` and holder, one for each holder by its `budget`, `uniform`"
        " (one for all), a number, or your own rule",
    )
    aggregation: _Aggregation = Field(
        default="concat",
        description="`concat` sums the products, exactly until `residual.max_rank` cuts; `fedavg` averages the factors;"
        " `hetlora` pads and truncates them; `flexlora` and `raflora` redistribute by SVD; `florist` keeps an update's"
        " leading directions; `fedplora` averages each direction over those who trained it;"
        " `none` on a single node; or your own rule",
    )
    self_pruning: SelfPruning | None = Field(
        default=None, description="whether holders give up ranks that they do not need; with `hetlora`"
    )
    reinit: Literal["random", "svd", "mean"] = Field(
        default="mean",
        description="what adapters restart with after `concat`: fresh, the update's leading part, or the mean factors;"
        " the rest of the exact sum joins the residual",
    )
    moments: Literal["drop", "keep", "fit"] = Field(
        default="keep",
        description="whether the optimizer's moments outlive an aggregation; `fit` = they stay where an adapter goes on"
        " as it is, and where it restarts in other directions the second moments' mean over the old ones stays; of"
        " directions that begin afresh, as all do with reinit `random`, they begin at zero in any case",
    )
    init: Literal["shared", "independent"] = Field(
        default="shared", description="whether all holders of a weight draw the same initial A"
    )
    lr_scaling: Literal["none", "sqrt"] = Field(
        default="none",
        description="`sqrt`: the n holders of a layer, clients and servers that train it, step it with the square root"
        " of n times `job.lr`: the mean of n steps of Adam, each on data of its own, is shorter by that than one step"
        " on all of it (plain SGD's is not, and keeps `job.lr`)",
    )
    freeze: Literal["never", "planned"] = Field(
        default="planned",
        description="whether a client may only compute forward, its layers frozen, where training them would hold"
        " everybody up for longer than it is worth; only for placement `split` and `concat`",
    )

    pace: Pace = Field(default=Pace(), description="what keeps holders from waiting; only for placement `split`")
    importance: Importance = Field(default=Importance(), description="which weights matter")
    replan: Replan = Field(default=Replan(), description="when a new plan is made")
    objective: Objective = Field(default=Objective(), description="the constants of what plans maximize")

    @property
    def freezes(self) -> bool:
        """True if plans may leave the layers of clients untrained."""
        return self.freeze == "planned" and self.placement == "split" and self.aggregation == "concat"

    @property
    def probes(self) -> bool:
        """True if a run has to measure importance, since some plan depends on it."""
        by_importance = self.ranks in ("importance", "budget") or is_reference(self.ranks)
        # One rank for all captures the same at every split, unless learning apart has its price.
        by_importance = by_importance or self.objective.kappa > 0
        searched = self.placement == "split" and self.split == "planned" and by_importance
        by_importance = self.ranks == "importance" or is_reference(self.ranks)
        split_by_importance = searched or (self.placement == "split" and is_reference(self.split))
        return self.train == "adapters" and self.importance.metric != "equal" and (by_importance or split_by_importance)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        for key, reason in self._contradictions():
            raise refuse(reason, key)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Combinations that are not allowed: key and reason."""
        one_rank = self.ranks == "uniform" or isinstance(self.ranks, int)
        if self.aggregation == "fedavg" and not one_rank:
            yield (
                "aggregation",
                "fedavg averages factors of equal shape, so it needs one rank for all: set ranks to 'uniform'"
                f" or a number, or aggregation to 'concat' (got ranks {shown(self.ranks)})",
            )
        if self.placement != "split" and self.split != "planned":
            yield "split", f"placement {self.placement!r} splits nothing: leave split out (got {shown(self.split)})"
        if self.placement == "single" and self.aggregation != "none":
            yield "aggregation", f"must be 'none' on a single node (got {shown(self.aggregation)})"
        if self.placement != "single" and self.aggregation == "none":
            yield "aggregation", "'none' would leave every holder with a model of its own; it needs placement 'single'"
        if self.train == "weights" and self.placement != "single":
            yield "train", f"'weights' needs placement 'single' (got {shown(self.placement)})"
        if self.placement != "split" and self.pace != Pace():
            yield "pace", f"placement {self.placement!r} has no steps that holders share: leave pace out"
        if self.pace.ahead and self.pace.periods == "none":
            yield "pace", "ahead needs periods: where all wait for all, nobody has anything to compute ahead"
        if self.self_pruning is not None and self.moments != "drop":
            yield "self_pruning", "needs moments 'drop': kept moments would move directions that were given up"
        if self.self_pruning is not None and self.aggregation != "hetlora":
            yield (
                "self_pruning",
                "needs aggregation 'hetlora', which keeps the order of the directions"
                f" (got aggregation {shown(self.aggregation)})",
            )
