"""Networks take other neurons than LIF: fused and by definition, stored and recomputed."""

import copy

import pytest
import timm
import torch
from kernel_runs import assert_same, randomize, results_of
from test_models import SMALL, inputs_for

from tetdist.errors import UserError

T = 2
NETWORKS = SMALL | {"psn_sew_resnet18": {"width": 4}, "sew_resnet50": {"width": 4}}
del NETWORKS["spiking_resnet50"]  # so small it hardly fires
KINDS = {
    "lif": {},
    "plif": {},
    "psn": {"timesteps": T},
    "masked_psn": {"timesteps": T},
    "sliding_psn": {},
    "ilif": {},
    "nilif": {},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def network(name, kind):
    torch.manual_seed(0)
    neuron = {"kind": kind, "threshold": 0.3} | KINDS[kind]
    options = NETWORKS[name] | {"num_classes": 3, "timesteps": T, "neuron": neuron}
    model = timm.create_model(name, **options)
    randomize(model)
    return model.double().train(), inputs_for(name, bins=T)


def step(model, x):
    return results_of(model, lambda m: m(x, per_timestep=True), {})


# Sums of integers are what networks have to allow for. test_published.py has LIF in all networks.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "ilif") for name in NETWORKS if name != "spiking_convnet"),
        *(("spiking_convnet", kind) for kind in KINDS),
        ("qkformer_4_384_cifar", "psn"),
    ],
)
def test_a_step(name, kind):
    """Logits, gradients and statistics; and logits in evaluation."""
    model, x = network(name, kind)
    kept = step(model, x)
    assert kept["output"].std() > 0
    model.set_grad_checkpointing()
    assert_same(step(model, x), kept, rtol=0)
    model.set_grad_checkpointing(False)
    with torch.no_grad():
        evaluated = copy.deepcopy(model).eval()(x)
    model.set_execution("reference")
    assert_same(kept, step(model, x), rtol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(evaluated, model.eval()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_segments(kind):
    """Segments of one timestep, recomputed or not; refused if a neuron sees all timesteps."""
    model, x = network("spiking_convnet", kind)
    if kind in ("psn", "masked_psn"):
        with pytest.raises(UserError, match="cannot run in segments of 1"):
            model.set_segment(1)
        return
    model.set_segment(1)
    results = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        results.append(step(model, x))
    assert_same(results[1], results[0], rtol=1e-10)
    # The second segment starts where the first ended, unlike a network of one timestep.
    model.set_timesteps(1)
    alone = model(x, per_timestep=True)
    assert torch.equal(alone[0], results[0]["output"][0])
    assert not torch.equal(alone[0], results[0]["output"][1])
