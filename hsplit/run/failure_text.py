"""Failures of actors in a user's words."""

from __future__ import annotations

from hsplit.actors.executor import ActorFailure

# Methods of actors in a user's words.
_WORDS = {
    "load_data": "reading its data",
    "configure": "reading its layers",
    "restart": "beginning the round",
    "rejoin": "beginning the round",
    "load_state": "taking up its state",
    "forward": "its forward",
    "tail": "its loss",
    "backward": "its backward",
    "train_step": "a local step",
    "end_step": "a local step",
    "collect": "handing in its adapters",
    "aggregate": "the aggregation",
    "validation_forward": "validation",
    "validation_tail": "validation",
    "validate": "validation",
    "evaluate": "validation",
    "evaluate_deep": "validation",
    "state": "a checkpoint",
    "probe": "the importance probe",
    "probe_forward": "the importance probe",
    "probe_tail": "the importance probe",
    "probe_backward": "the importance probe",
    "shrink": "a change of plan",
    "reconfigure": "a change of plan",
    "review": "planning",
    "first": "planning",
    "check": "planning",
    "resume_state": "taking up its state",
}


def method_words(failure: ActorFailure) -> str:
    """The method that failed, in a user's words: ``its forward``."""
    return _WORDS.get(failure.method, failure.method)


def describe(failure: ActorFailure) -> str:
    """A failure in a user's words: ``phone-0 failed in its forward (its process ended)``."""
    return f"{failure.actor} failed in {method_words(failure)} ({failure.reason})"
