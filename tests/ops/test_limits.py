"""A map that no machine holds is refused with the numbers, and only where it would be allocated."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import efficient_attention as ea
from efficient_attention import memory


@pytest.fixture
def small_machine(monkeypatch):
    """A machine of 1 MiB: maps of more than 512 x 512 positions in float32 do not fit."""
    monkeypatch.setattr(
        memory, "device_bytes", lambda device: 1 << 20 if device.type == "cpu" else None
    )


def qkv(positions=513, **options):
    return [torch.randn(1, 1, positions, 4, **options) for _ in range(3)]


def test_non_local_block_on_a_volume_refuses_with_the_numbers_instead_of_being_killed(monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: int(23.4 * 2**30))
    block = ea.NonLocal3d(2, normalization="scaling")
    with pytest.raises(MemoryError) as caught:
        block(torch.zeros(1, 2, 48, 64, 128))
    message = str(caught.value)
    assert "(1, 1, 393216, 393216)" in message
    assert "takes 576.0 GiB" in message
    assert "cpu has 23.4 GiB" in message
    assert "efficient_attention(..., normalization='scaling')" in message


def test_quadratic_order_refuses_a_map_in_the_dtype_of_its_sums(small_machine):
    q, k, v = qkv(dtype=torch.float16)
    # 513 x 513 numbers of 4 bytes, though those of the inputs have 2.
    with pytest.raises(MemoryError, match=r"0\.0 GiB, .* Use order='linear'"):
        ea.efficient_attention(q, k, v, order="quadratic")
    assert ea.efficient_attention(q, k, v, order="linear").shape == v.shape


def test_a_map_that_fits_is_not_refused(small_machine):
    q, k, v = qkv(512)
    assert ea.dot_product_attention(q, k, v, normalization="scaling").shape == v.shape
    assert ea.efficient_attention(q, k, v, order="quadratic").shape == v.shape


def test_fused_attention_is_never_refused(small_machine):
    q, k, v = qkv()
    assert ea.dot_product_attention(q, k, v).shape == v.shape


def scaled(q, k, v):
    return ea.dot_product_attention(q, k, v, normalization="scaling")


def test_nothing_is_refused_where_nothing_is_allocated(small_machine):
    q, k, v = qkv(device="meta")
    assert scaled(q, k, v).shape == v.shape
    with FakeTensorMode() as mode:
        assert scaled(*map(mode.from_tensor, qkv())).shape == v.shape


def test_compiled_exported_and_transformed_programs_are_not_checked(small_machine):
    q, k, v = qkv()
    with pytest.raises(MemoryError):
        scaled(q, k, v)
    expected = (q @ k.mT / 513) @ v
    close = torch.testing.assert_close
    close(torch.compile(scaled, fullgraph=True, backend="eager")(q, k, v), expected)
    close(torch.vmap(scaled)(*(x[None] for x in (q, k, v)))[0], expected)

    class Scaled(torch.nn.Module):
        def forward(self, q, k, v):
            return scaled(q, k, v)

    close(torch.export.export(Scaled(), (q, k, v)).module()(q, k, v), expected)
