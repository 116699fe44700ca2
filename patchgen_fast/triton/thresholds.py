"""Which backend a call on a GPU tries first, where the order triton, cuda, torch is in doubt.

Measured rules go before the default: those that `patchgen-fast tune` wrote for the GPU at hand,
else those that ship for a GPU of its name. No GPU's ship yet: no shape of ours has been timed
beside torch's best. So the default is the conservative one: torch where one stock kernel does the
whole call, and the usual order where torch would need several passes over memory (a mask built from
lengths and offsets, a log-sum-exp computed again, uint8 images made float and normalised first).
Conditions are of few kinds and of no exact size, so that torch.compile does not compile again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..dispatch import BACKENDS
from . import tuned


class Rule(NamedTuple):
    """What was measured fastest for a plain 16-bit self-attention of head dimension `d`, from the
    next smaller rule's tokens to `n`; `training`: forward and backward together.
    """

    d: int
    n: int
    training: bool
    backend: str


# By torch.cuda.get_device_name(). A line is to carry the figures that it rests on.
MEASURED: dict[str, tuple[Rule, ...]] = {}


def _on_gpu(args: Any) -> bool:
    return args[0].device.type == "cuda"


@torch.compiler.assume_constant_result  # a graph is traced with the rules of its time
def rules() -> tuple[tuple[int, int, bool, str], ...]:
    """The measured rules of this GPU as plain tuples, fewest tokens first; read once a process."""
    global _rules
    if _rules is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        found = _user_rules() or MEASURED.get(name, ())
        _rules = tuple(sorted((rule.d, rule.n, rule.training, rule.backend) for rule in found))
    return _rules


_rules: tuple[tuple[int, int, bool, str], ...] | None = None


def forget() -> None:
    """Reads the measured rules anew at the next call."""
    global _rules
    _rules = None


def _user_rules() -> tuple[Rule, ...]:
    """Those of `patchgen-fast tune`; none, with a warning, where one is none of ours."""
    rules = []
    for entry in tuned.document()["dispatch"]:
        kinds = [type(x) for x in entry] if isinstance(entry, list) else []
        if kinds != [int, int, bool, str] or entry[3] not in BACKENDS:
            tuned.distrust(tuned.path(), f"got {entry!r} for [D, tokens, training, backend]")
            return ()
        rules.append(Rule(*entry))
    return tuple(rules)


def _measured(args: Any) -> str | None:
    """The backend that a rule names for this call, if rules are about calls of its kind."""
    query, key, value = args[:3]
    _, _, tokens, d = query.shape
    if args.attn_mask is not None or args.is_causal or key.shape[2] != tokens:
        return None
    if query.dtype.itemsize != 2:
        return None
    training = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad
    )
    for rule_d, most, rule_training, backend in rules():
        if rule_d == d and rule_training == training and tokens <= most:
            return backend
    return None


def attention(args: Any) -> str | None:
    """A rule's backend, or torch if scaled_dot_product_attention takes the call as it is.

    The backward, which asks too, goes with its forward: only a forward's arguments have return_lse.
    """
    plain = (
        args.kv_lengths is None
        and args.query_offset is None
        and not getattr(args, "return_lse", True)
        and _on_gpu(args)
        and args.query.shape[1] == args.key.shape[1]
    )
    return (_measured(args) or "torch") if plain else None


def patch_embed(args: Any) -> str | None:
    """torch, if the images are float and already normalised: then it is one convolution."""
    plain = args.images.is_floating_point() and args.mean is None and args.std is None
    return "torch" if _on_gpu(args) and plain else None


def patch_unembed(args: Any) -> str | None:
    """torch: it is one transposed convolution, or a product and a copy."""
    return "torch" if _on_gpu(args) else None
