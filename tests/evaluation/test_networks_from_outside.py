"""A network outside tetdist's classes is evaluated through the minimal interface."""

import numpy as np
import pytest
import torch
from one_batch import OneBatch
from torch import nn

from tetdist.apps.reports.evaluation_page import as_text, html_page
from tetdist.data.loader import Batch
from tetdist.errors import UserError
from tetdist.evaluation.suite import run_suite

T, CLASSES = 3, ("a", "b", "c", "d")


class Outside(nn.Module):
    """Logits that grow with time, by a convolution that sees (B, C, H, W)."""

    def __init__(self, input_kind="images"):
        super().__init__()
        self.timesteps, self.num_classes, self.input_kind = T, len(CLASSES), input_kind
        self.conv = nn.Conv2d(3 if input_kind == "images" else 2, len(CLASSES), 3)

    def set_timesteps(self, timesteps):
        self.timesteps = timesteps

    def forward(self, x, per_timestep=False):
        assert per_timestep, "no other call is allowed"
        frames = [x] * self.timesteps if x.ndim == 4 else x[:, : self.timesteps].unbind(1)
        steps = enumerate(frames, start=1)
        return torch.stack([t * self.conv(frame).mean((2, 3)) for t, frame in steps])


def evaluator_of(model, world):
    torch.manual_seed(0)
    shape = (8, 3, 6, 6) if model.input_kind == "images" else (8, T, 2, 6, 6)
    index = type("Index", (), {"classes": CLASSES})
    config = None
    batch = Batch(torch.rand(shape), torch.arange(8) % 4, np.arange(8))
    return OneBatch(model, config, index, world, lambda: None, batch, "fp32")


@pytest.mark.parametrize("kind", ["images", "events"])
def test_all_but_what_is_known_of_ours_is_reported(kind, alone):
    model = Outside(kind)
    evaluator = evaluator_of(model, alone)
    found = run_suite(evaluator, timesteps=[T])
    with torch.no_grad():
        logits = model(evaluator.batch.images, per_timestep=True)
    right = (logits.mean(0).argmax(-1) == evaluator.batch.labels).double().mean()
    assert found["top1"] == pytest.approx(100 * float(right))
    assert found["operations"] is None
    assert found["firing_rate"] == {}
    about = {"checkpoint": "x", "model": "outside", "step": 1, "split": "val"}
    about |= {"trained_timesteps": T, "reported_timesteps": [1, T]}
    for text in (as_text(about | found), html_page(about | found)):
        assert "operations are only counted for" in text


def test_other_than_logits_of_each_timestep_is_refused(alone):
    model = Outside()
    model.forward = lambda x, **_: torch.zeros(len(x), 4)
    with pytest.raises(
        UserError, match=r"returned \(8, 4\) .* must return logits \(3, 8, classes\)"
    ):
        run_suite(evaluator_of(model, alone), timesteps=[T])
