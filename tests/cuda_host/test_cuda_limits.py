"""The sizes by which dispatch refuses are those that the kernels' plans ask for."""

from __future__ import annotations

import pytest

from patchgen_fast.ops import _cuda_limits as limits

HEAD_DIMS = range(8, 129, 8)


@pytest.mark.parametrize("keys", [0, 1, 16, 197, 272])
def test_forward(library, keys):
    for head_dim in HEAD_DIMS:
        expected = library.host_attention_forward_bytes(head_dim, keys)
        assert limits.forward_bytes(head_dim, keys) == expected


@pytest.mark.parametrize("queries, keys, group", [(1, 1, 1), (197, 197, 1), (50, 272, 3)])
def test_backward(library, queries, keys, group):
    for head_dim in HEAD_DIMS:
        expected = library.host_attention_backward_bytes(head_dim, queries, keys, group)
        assert limits.backward_bytes(head_dim, queries, keys, group) == expected


@pytest.mark.parametrize("channels, side", [(1, 1), (3, 14), (3, 16), (4, 2), (3, 63)])
def test_patch_embed(library, channels, side):
    expected = library.host_patch_embed_bytes(channels, side)
    assert limits.patch_embed_bytes(channels * side * side, channels) == expected
