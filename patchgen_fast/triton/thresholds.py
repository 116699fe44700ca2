"""Which backend a call on a GPU tries first, where the order triton, cuda, torch is in doubt.

Nothing here is measured yet: no shape of ours has been timed beside torch's best on a GPU. So the
rule is the conservative one: torch where one stock kernel does the whole call, and the usual order
where torch would need several passes over memory (a mask built from lengths and offsets, a
log-sum-exp computed again, uint8 images made float and normalised first). Conditions are of few
kinds and of no exact size, so that torch.compile does not compile again.
"""

from __future__ import annotations

from typing import Any


def _on_gpu(args: Any) -> bool:
    return args[0].device.type == "cuda"


def attention(args: Any) -> str | None:
    """torch, if scaled_dot_product_attention takes the call as it is.

    The backward, which asks too, goes with its forward: only a forward's arguments have return_lse.
    """
    plain = (
        _on_gpu(args)
        and not getattr(args, "return_lse", True)
        and args.kv_lengths is None
        and args.query_offset is None
        and args.query.shape[1] == args.key.shape[1]
    )
    return "torch" if plain else None


def patch_embed(args: Any) -> str | None:
    """torch, if the images are float and already normalised: then it is one convolution."""
    plain = args.images.is_floating_point() and args.mean is None and args.std is None
    return "torch" if _on_gpu(args) and plain else None


def patch_unembed(args: Any) -> str | None:
    """torch: it is one transposed convolution, or a product and a copy."""
    return "torch" if _on_gpu(args) else None
