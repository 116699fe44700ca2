"""Where the generator looked as it drew a patch: the attention weights of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.layers import Attention, CrossAttention
from ..models.patches import patchify
from .model import PatchGenerator, Task, take_in_order


class AttentionMaps(NamedTuple):
    """Weights after the softmax, by layer, each `[B, H, N, M]`; every row sums to 1.

    Args:
        encoder: from the seen patches to the seen patches, in the order of `task.seen`.
        decoder: from the patch drawn at a step to the start token and the patches before it.
        cross: from the patch drawn at a step to the label's token and the seen patches.
    """

    encoder: list[Tensor]
    decoder: list[Tensor]
    cross: list[Tensor]


@torch.no_grad()
def attention_maps(
    model: PatchGenerator,
    images: Tensor,
    labels: Tensor,
    task: Task,
    *,
    seen_in: Tensor | None = None,
) -> AttentionMaps:
    """All weights as the images `[B, C, H, W]` are drawn once more, in one pass, in float32.

    `seen_in` are the images that the encoder sees, by default the same.
    The same for an eager and for a swapped model: the weights are computed from what goes into the
    attention layers, beside them.
    """
    device = model.label.weight.device
    source = (images if seen_in is None else seen_in).to(device)
    images, labels, task = images.to(device), labels.to(device), task.to(device)
    found = AttentionMaps([], [], [])
    with ExitStack() as hooks:
        layer: Any
        for layer in model.encoder.layers:
            hooks.enter_context(_recording(layer.attn, found.encoder))
        for layer in model.decoder.layers:
            hooks.enter_context(_recording(layer.attn, found.decoder, causal=True))
            hooks.enter_context(_recording(layer.cross_attn, found.cross))
        memory = model.memory(labels, None if task.seen is None else source, task.seen)
        patches = take_in_order(patchify(images, model.config.transformer.patch_size), task.order)
        model.states(patches[:, :-1], task.order, memory)
    return found


@contextmanager
def _recording(layer: Any, into: list[Tensor], *, causal: bool = False) -> Iterator[None]:
    """Append the weights of every call of an attention layer to a list."""

    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, CrossAttention):
            query, key = _of_cross_attention(module, inputs[0], inputs[1])
        else:
            query, key = _of_self_attention(module, inputs[0])
        scores = query.float() @ key.float().mT / query.shape[-1] ** 0.5
        if causal:
            future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        into.append(scores.softmax(dim=-1))

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _of_self_attention(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key `[B, H, N, D]` of a self-attention layer for its input `[B, N, E]`."""
    qkv = layer.qkv(x).unflatten(2, (3, layer.num_heads, layer.head_dim))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return layer.q_norm(query), layer.k_norm(key)


def _of_cross_attention(layer: CrossAttention, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Query `[B, H, N, D]` and key `[B, H, M, D]` for tokens and memory."""
    query = layer.q(x).unflatten(2, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    key = layer.kv(memory).unflatten(2, (2, layer.num_heads, layer.head_dim))[:, :, 0]
    return layer.q_norm(query), layer.k_norm(key.transpose(1, 2))


def on_grid(
    weights: Tensor, places: Tensor, grid_size: tuple[int, int], *, skip: int = 0
) -> Tensor:
    """Weights `[H, M]` of one query as pictures `[H, rows, columns]`.

    Column `skip + i` belongs to the patch at `places[i]`; the first `skip` (label or start token)
    have no place. NaN where no patch was to be seen.
    """
    rows, columns = grid_size
    picture = weights.new_full((len(weights), rows * columns), float("nan"))
    seen = weights[:, skip : skip + len(places)]
    picture[:, places[: seen.shape[1]]] = seen
    return picture.unflatten(1, (rows, columns))


def save_maps(
    folder: Path,
    model: PatchGenerator,
    image: Tensor,
    label: Tensor,
    task: Task,
    place: int,
    *,
    seen_in: Tensor | None = None,
) -> list[Path]:
    """Pictures of where the patch at a place of one image `[1, C, H, W]` looked; their paths.

    `decoder.png`: at the patches drawn before; `cross.png` and `encoder.png`, where anything was
    seen: at the seen patches, from the decoder and among themselves. `seen_in` `[1, C, H, W]` is
    the image that the encoder sees, by default the one that is drawn.
    """
    from .pictures import save_attention

    source = image if seen_in is None else seen_in
    maps = attention_maps(model, image, label, task, seen_in=source)
    grid = model.config.transformer.grid_size
    order = task.order.reshape(-1, task.order.shape[-1])[0].cpu()
    step = int((order == place).nonzero())
    paths = [folder / "decoder.png"]

    def save(path: Path, picture: Tensor, layers: list[Tensor], title: str) -> None:
        names = [f"layer {number + 1}" for number in range(len(layers))]
        save_attention(path, picture[0], layers, names, place, title)

    looked = [
        on_grid(layer[0, :, step].cpu(), order[:step], grid, skip=1) for layer in maps.decoder
    ]
    save(paths[0], image, looked, f"patch {place}: decoder, at the patches drawn before")
    if task.seen is not None:
        seen = task.seen.reshape(-1, task.seen.shape[-1])[0].cpu()
        paths += [folder / "cross.png"]
        looked = [on_grid(layer[0, :, step].cpu(), seen, grid, skip=1) for layer in maps.cross]
        save(paths[-1], source, looked, f"patch {place}: decoder, at the encoder's tokens")
        if place in seen.tolist():
            row = seen.tolist().index(place)
            looked = [on_grid(layer[0, :, row].cpu(), seen, grid) for layer in maps.encoder]
            paths += [folder / "encoder.png"]
            save(paths[-1], source, looked, f"patch {place}: encoder, at the seen patches")
    return paths
