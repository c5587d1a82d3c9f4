"""Orders that are fixed before export."""

import pytest
import torch
from torch import nn

import efficient_attention as ea


def test_freeze_names_what_the_planner_picks():
    model = nn.Sequential(
        ea.EfficientAttention2d(8, 4, 8),
        nn.ReLU(),
        ea.EfficientAttention2d(8, 16, 4, num_heads=2, order="folded"),
    )
    x = torch.randn(1, 8, 20, 20)
    planned = model[0].planned_order(x)
    assert ea.freeze(model, x) == {"0": planned}
    assert [model[0].order, model[2].order] == [planned, "folded"]
    assert not model[0]._forward_pre_hooks


def test_freeze_changes_nothing_else():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(), ea.EfficientAttention2d(8)).train()
    model[1].eval()
    seen = []
    model[2].register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ea.freeze(model, torch.randn(2, 8, 5, 5))
    assert seen == [False]
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(("length", "order"), [(3, "quadratic"), (50, "linear")])
def test_freeze_reaches_the_attention_of_encoder_layers(length, order):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn = ea.MultiheadEfficientAttention(8, 2, batch_first=True)
    assert ea.freeze(layer, torch.randn(1, length, 8)) == {"self_attn": order}


def test_freeze_refuses_conflicting_shapes_and_changes_nothing():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ea.EfficientAttention(8)

        def forward(self, x):
            return self.attention(x[:, :2]), self.attention(x)

    model = Twice()
    with pytest.raises(
        ValueError, match="attention is called with inputs whose cheapest orders differ"
    ):
        ea.freeze(model, torch.randn(1, 500, 8))
    assert model.attention.order == "auto"
    assert not model.attention._forward_pre_hooks
