"""Small models whose layers matter: larger initial weights, so that a wrong mixer changes the output visibly."""

from __future__ import annotations

import pytest
import torch

import zoo


@pytest.fixture
def make():
    """A tiny model by name, in evaluation mode, float64 unless told."""

    def make(name: str, dtype: torch.dtype = torch.float64, **overrides):
        torch.manual_seed(1)
        model = zoo.create_model(name, initializer_range=0.2, **overrides).to(dtype).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("mix_logit_H"):
                    parameter.zero_()  # both branches count
                elif parameter.dim() == 1 or not parameter.any():
                    # No bias is zero, no norm weight one, no projection (as RWKV's are at the start) nothing.
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def ids_BL():
    """Two rows of 21 tokens; more than the window of the tiny models, not a multiple of anything."""
    return torch.randint(1, 256, (2, 21), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def images():
    """Two images that fit a model, in its dtype; `scale` times as large as those it is made for."""

    def images(model, scale: int = 1) -> torch.Tensor:
        options = model.config.spec.image
        size = (2, options.channels, scale * options.image_size, scale * options.image_size)
        generator = torch.Generator().manual_seed(2)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)

    return images
