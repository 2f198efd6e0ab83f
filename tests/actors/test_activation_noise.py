"""The noise on activations: as large as declared, and known to the client alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hsplit.actors.client import ActivationNoise, Client
from hsplit.config import Job, Policy
from hsplit.lora.holder import RoundUpdate
from hsplit.models.segment import BaseModel
from hsplit.models.spec import ModelSpec
from hsplit.planning.plan import HolderPlan
from tests.in_process import random_examples


def test_without_noise_nothing_is_changed() -> None:
    hidden = 100 * torch.randn(4, 8)
    assert ActivationNoise(0.0, 1.0).added_to(hidden) is hidden


def test_positions_are_clipped_each_and_the_noise_has_the_size_that_is_asked_for() -> None:
    torch.manual_seed(0)
    hidden = torch.cat([10 * torch.randn(500, 64), 1e-3 * torch.randn(500, 64), torch.zeros(1, 64)])
    clipped = ActivationNoise(1e-9, 2.0).added_to(hidden)
    norms = clipped.norm(dim=1)
    assert norms.max() < 2.0 + 1e-5 and torch.allclose(norms[:500], torch.tensor(2.0))
    assert torch.allclose(clipped[500:], hidden[500:], atol=1e-6)
    assert torch.allclose(torch.nn.functional.cosine_similarity(clipped[:500], hidden[:500]), torch.tensor(1.0))
    draw = ActivationNoise(0.5, 2.0).added_to(hidden) - clipped
    assert float(draw.std()) == pytest.approx(0.5 * 2.0, rel=0.02)
    assert abs(float(draw.mean())) < 0.02
    # Gaussian: the kurtosis of a uniform draw is 1.8.
    assert float((draw / draw.std()).pow(4).mean()) == pytest.approx(3.0, rel=0.05)
    # Independent from entry to entry.
    correlation = torch.corrcoef(draw.T) - torch.eye(64)
    assert float(correlation.abs().max()) < 0.2


def test_the_gradient_goes_through_the_clipping() -> None:
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def noiseless(values: torch.Tensor) -> torch.Tensor:
        return ActivationNoise(1e-30, 1.0).added_to(values)

    assert torch.autograd.gradcheck(noiseless, (hidden,))


def test_nobody_who_knows_the_run_can_draw_the_same_noise(models: dict[str, Path]) -> None:
    """Seed, name, step and data are the same: the server has the first three, and guesses the last."""
    sent = []
    for _ in range(2):
        # Whoever seeds torch's generator alike changes nothing.
        torch.manual_seed(0)
        job = Job.model_validate({"dtype": "fp32", "wire": "fp32", "privacy": {"noise": 0.1}, "max_length": 32})
        client = Client("c0", job, Policy(), BaseModel.of_job(ModelSpec.read(models["llama"]), job))
        client.load_data({"c0": random_examples(12, 0)}, None)
        client.configure(HolderPlan("c", "client", True, 2))
        client.restart(RoundUpdate(1, {}, {}))
        for _ in range(2):
            torch.manual_seed(0)
            sent.append(client.forward(0, 0)[1].hidden.unpack(torch.float32, "cpu"))
            sent.append(client.validation_forward(0)[1].hidden.unpack(torch.float32, "cpu"))
            sent.append(client.probe_forward(0, 8)[1].hidden.unpack(torch.float32, "cpu"))
    for kind in range(3):
        draws = sent[kind::3]
        assert len(draws) == 4
        for index, one in enumerate(draws):
            for other in draws[:index]:
                # Each has noise of its own: of sqrt(2) times the size of one, and no entry alike.
                assert float((one - other).std()) == pytest.approx(0.1 * 2**0.5, rel=0.15)
                assert not (one == other).any()
