"""The cost volume and the soft argmin: against their definitions, by hand, and in little memory."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_attention.memory import peak_bytes
from efficient_attention.models import disparity
from efficient_attention.models.disparity import cost_volume, soft_argmin
from efficient_attention.testing import assert_as_precise_as_plain

EXACT = {"rtol": 0, "atol": 1e-12}
MIB = 2**20


def defined_volume(left, right, levels):
    """Position by position."""
    batch, channels, height, width = left.shape
    volume = left.new_zeros(batch, 2 * channels, levels, height, width)
    for d in range(levels):
        for x in range(d, width):
            volume[:, :channels, d, :, x] = left[..., x]
            volume[:, channels:, d, :, x] = right[..., x - d]
    return volume


def plain_soft_argmin(scores, size, align_corners):
    """As one would type it: three volumes of full size."""
    volume = F.interpolate(scores[:, None], size, mode="trilinear", align_corners=align_corners)
    weights = volume[:, 0].softmax(1)
    pixels = torch.arange(size[0], dtype=scores.dtype)
    return (weights * pixels[:, None, None]).sum(1)


def with_gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = function(*inputs)
    slope = torch.arange(y.numel()).remainder(7).sub(3).view_as(y).to(y.dtype)
    return y, *torch.autograd.grad(y, inputs, slope)


def test_the_volume_of_three_columns_by_hand():
    left, right = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])
    volume = cost_volume(left.view(1, 1, 1, 3), right.view(1, 1, 1, 3), 4)
    assert volume.shape == (1, 2, 4, 1, 3)
    assert volume[0, 0, :, 0].tolist() == [[1, 2, 3], [0, 2, 3], [0, 0, 3], [0, 0, 0]]
    assert volume[0, 1, :, 0].tolist() == [[4, 5, 6], [0, 4, 5], [0, 0, 4], [0, 0, 0]]


@pytest.mark.parametrize("levels", [1, 4, 5, 9])
def test_the_volume_and_its_gradients_are_the_definitions_bit_for_bit(levels):
    # Of whole numbers, so that no order of sums rounds.
    left, right = torch.randint(-50, 50, (2, 2, 3, 4, 5)).double()
    found = with_gradients(lambda *views: cost_volume(*views, levels), left, right)
    expected = with_gradients(lambda *views: defined_volume(*views, levels), left, right)
    assert all(map(torch.equal, found, expected))


class Written(TorchDispatchMode):
    """Counts the elements of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        y = function(*args, **(kwargs or {}))
        self.elements += y.numel() if isinstance(y, torch.Tensor) else 0
        return y


def test_no_gradient_of_the_whole_volume_is_copied_level_by_level():
    left, right = torch.randn(2, 1, 8, 16, 32)
    left.requires_grad_()
    right.requires_grad_()
    volume = cost_volume(left, right, 24)
    with Written() as written:
        volume.backward(torch.ones_like(volume))
    # Assigned slices would write 48 volumes; the levels of one, with their views and sums, are few.
    assert written.elements < 8 * volume.numel()


@pytest.mark.parametrize("level", [0, 1, 17, 46, 47])
def test_a_sharp_peak_is_where_the_corners_put_it(level):
    scores = torch.zeros(1, 48, 1, 1, dtype=torch.float64)
    scores[0, level] = 1e4
    # Pixels 4i .. 4i + 3 are around level i, which the two in the middle share; at the ends, those beyond it.
    expected = {0: 0.5, 47: 190.5}.get(level, 4 * level + 1.5)
    found = soft_argmin(scores, (192, 4, 4), align_corners=False)
    torch.testing.assert_close(found, torch.full((1, 4, 4), expected).double(), **EXACT)
    # Level i is at 191 / 47 i = 4.064 i; next to it is one pixel.
    found = soft_argmin(scores, (192, 4, 4), align_corners=True)
    expected = float(round(191 / 47 * level))
    torch.testing.assert_close(found, torch.full((1, 4, 4), expected).double(), **EXACT)


def test_the_expectation_of_two_disparities_by_hand():
    # Nothing to interpolate: weights 1/4 and 3/4, and 2/3 and 1/3.
    scores = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).log().view(1, 2, 1, 2)
    found = soft_argmin(scores, (2, 1, 2), align_corners=False)
    torch.testing.assert_close(found, torch.tensor([[[3 / 4, 1 / 3]]]))


def test_columns_and_rows_are_interpolated_by_hand():
    # Level 1 against level 0 by log-odds that go from 0 to 4 in columns, from 0 to 8 in rows.
    scores = torch.zeros(1, 2, 2, 2)
    scores[0, 1] = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    odds = torch.tensor([[0.0, 2.0, 4.0], [4.0, 6.0, 8.0], [8.0, 10.0, 12.0]])
    found = soft_argmin(scores, (2, 3, 3), align_corners=True)
    torch.testing.assert_close(found, odds.sigmoid()[None])


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("block_bytes", [1, 2**24])
def test_soft_argmin_and_its_gradient_are_those_of_the_plain_form(
    align_corners, block_bytes, monkeypatch
):
    monkeypatch.setattr(disparity, "_BLOCK_BYTES", block_bytes)
    size = (20, 12, 28)
    scores = 3 * torch.randn(2, 5, 3, 7, dtype=torch.float64)
    found = with_gradients(lambda s: soft_argmin(s, size, align_corners=align_corners), scores)
    plain = with_gradients(lambda s: plain_soft_argmin(s, size, align_corners), scores)
    torch.testing.assert_close(found, plain, **EXACT)


@pytest.mark.parametrize("align_corners", [False, True])
def test_soft_argmin_is_as_precise_as_the_plain_form(align_corners):
    size = (64, 32, 48)
    scores = 3 * torch.randn(1, 16, 8, 12)
    truth = with_gradients(lambda s: plain_soft_argmin(s, size, align_corners), scores.double())
    plain = with_gradients(lambda s: plain_soft_argmin(s, size, align_corners), scores)
    found = with_gradients(lambda s: soft_argmin(s, size, align_corners=align_corners), scores)
    for what, *results in zip(("disparity", "gradient"), found, plain, truth, strict=True):
        assert_as_precise_as_plain(*results, what)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scores_are_expected_in_single_precision(dtype):
    scores, size = torch.randn(1, 8, 4, 6).to(dtype), (32, 16, 24)
    expected = soft_argmin(scores.float(), size, align_corners=False)
    with torch.autocast("cpu", dtype):
        assert torch.equal(soft_argmin(scores, size, align_corners=False), expected)


def test_no_volume_of_full_size_exists(monkeypatch):
    monkeypatch.setattr(disparity, "_BLOCK_BYTES", MIB // 4)
    size = (96, 128, 128)
    volume = 4 * 96 * 128 * 128
    scores = torch.randn(1, 24, 32, 32, requires_grad=True)
    training = peak_bytes(lambda: soft_argmin(scores, size, align_corners=False).sum().backward())
    # The rows, their transposition, gradients of both; and some blocks.
    assert training < 4 * volume / 16 + 5 * MIB // 4 < volume
    plain = peak_bytes(lambda: plain_soft_argmin(scores, size, False).sum().backward())
    assert plain > 2.5 * volume


def test_one_program_serves_any_size(monkeypatch):
    monkeypatch.setattr(disparity, "_BLOCK_BYTES", 2**14)  # one to three rows

    def match(left, right):
        scores = cost_volume(left, right, 5).mean(1)
        return soft_argmin(scores, (20, 4 * left.shape[2], 4 * left.shape[3]), align_corners=False)

    programs = CompileCounterWithBackend("eager")
    compiled = torch.compile(match, fullgraph=True, dynamic=True, backend=programs)
    for side in (6, 9, 17):
        left, right = torch.randn(2, 1, 3, side, side + 4, dtype=torch.float64)
        torch.testing.assert_close(compiled(left, right), match(left, right), **EXACT)
    assert programs.frame_count == 1
