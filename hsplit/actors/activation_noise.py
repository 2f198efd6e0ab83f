"""Noise on the activations that a client sends (``privacy.noise``)."""

from __future__ import annotations

import secrets

import numpy as np
import torch
from torch import Tensor


class ActivationNoise:
    """Clips each position's activations and adds Gaussian noise to them.

    Every call draws anew from a generator whose key, 128 bits of the operating system's randomness, stays in this
    object: whoever knew the draw could subtract it, and the server knows the run's seed and every client's name. Two
    sends with the same noise would give their difference away.

    No differential privacy is claimed: no bound on what leaves over a run is kept, and the generator is not a
    cryptographic one.

    Args:
        noise: standard deviation of each entry's noise, in units of ``clip``; 0: nothing is changed, nor clipped.
        clip: L2 norm that each position is clipped to.
    """

    def __init__(self, noise: float, clip: float) -> None:
        self.noise, self.clip = noise, clip
        self._generator = np.random.Generator(np.random.Philox(key=secrets.randbits(128)))

    def added_to(self, hidden: Tensor) -> Tensor:
        """Hidden states ``(n, d)``, clipped and noised, differentiably in ``hidden``."""
        if self.noise == 0:
            return hidden
        norm = hidden.norm(dim=-1, keepdim=True)
        clipped = hidden * (self.clip / norm.clamp_min(self.clip))
        # Allocated by torch, so that measurements see it.
        draw = torch.empty(hidden.shape, dtype=torch.float32)
        self._generator.standard_normal(dtype=np.float32, out=draw.numpy())
        return clipped + self.noise * self.clip * draw.to(hidden)
