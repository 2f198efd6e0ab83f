"""Which class a run's policy makes of its participants."""

from __future__ import annotations

from hsplit.actors.client import Client
from hsplit.actors.participant import Participant
from hsplit.actors.whole_client import WholeClient
from hsplit.config import Policy


def participant_class(policy: Policy) -> type[Participant]:
    """``Client`` where the model is split, ``WholeClient`` where each holds all of it."""
    return Client if policy.placement == "split" else WholeClient
