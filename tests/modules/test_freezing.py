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


class Memory(nn.Module):
    """Summarizes one input once, and lets another attend to it by whichever way is named."""

    def __init__(self, way):
        super().__init__()
        self.attention, self.way = ea.EfficientAttention(64, key_channels=48), way

    def forward(self, x, source):
        context = self.attention.summarize(source)
        return (
            self.attention(x, context)
            if self.way == "forward"
            else self.attention.attend(x, context)
        )


@pytest.mark.parametrize("way", ["forward", "attend"])
@pytest.mark.parametrize(
    ("queries", "keys", "order"),
    [
        (40, 5000, "folded_values"),
        (5000, 40, "folded_output"),
        (5000, 5000, "folded"),
        (3, 3, "linear"),
    ],
)
def test_freeze_plans_both_sides_of_a_context(way, queries, keys, order):
    model = Memory(way)
    x, source = torch.randn(1, queries, 64), torch.randn(1, keys, 64)
    expected = model(x, source)
    assert ea.freeze(model, x, source) == {"attention": order}
    assert torch.equal(model(x, source), expected)
    assert "_resolve" not in vars(model.attention)


def test_freeze_plans_a_side_that_comes_alone():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ea.EfficientAttention(64, key_channels=48)

        def forward(self, x):
            return self.attention.summarize(x)

    assert ea.freeze(Encoder(), torch.randn(1, 5000, 64)) == {"attention": "folded"}


def test_freeze_refuses_an_order_without_context_beside_a_context():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ea.EfficientAttention(64)

        def forward(self, x):
            return self.attention(x), self.attention.summarize(x)

    model = Both()
    with pytest.raises(ValueError, match=r"attention is called .* \('quadratic' and 'linear'\)"):
        ea.freeze(model, torch.randn(1, 3, 64))
    assert model.attention.order == "auto"


def test_freeze_leaves_what_the_example_does_not_reach():
    model = nn.Linear(8, 8)
    model.attention = ea.EfficientAttention(8)
    assert ea.freeze(model, torch.randn(1, 8)) == {}
    assert model.attention.order == "auto"
