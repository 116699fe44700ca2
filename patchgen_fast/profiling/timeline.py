"""Where a model is at every moment of a step: in which layer, and in which of our ops.

A timeline is a list of marks, each "from here on, the model is at this place". What a meter (a
clock, a counter) gains between two marks belongs to the place, so the parts of a step add up to the
whole by construction.

Forward: hooks on modules mark entering and leaving. No hook goes on what lies inside a fast layer,
because a fast layer takes the steps apart that a hook looks at; there, the layer's own note that it
runs and the calls of our ops make the marks. Backward: autograd calls a tensor's hook when its
gradient is complete, which is when the backward of what produced it begins; that makes the marks of
a training step. What lies between two ops of a fast layer counts for the layer whose op follows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..modules.state import FastLayer, state_of
from ..registry import Op

FORWARD, BACKWARD = "forward", "backward"


class Place(NamedTuple):
    """A layer by its qualified name, and one of our ops in it, or "" for the layer's own code.

    An op's name has the child of the layer whose work it does: `linear (qkv)`.
    """

    layer: str
    op: str = ""


class Mark(NamedTuple):
    """From this reading of the meter on, the model is at this place."""

    reading: Any
    place: Place
    direction: str


OUTSIDE = Place("(outside the model)")
IDLE = (nn.Identity, nn.ModuleList, nn.ModuleDict)
MODEL = "(model)"  # what the root module, whose qualified name is empty, is called


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that a profile tells apart, by qualified name.

    Fast layers, and outside of these every module that does something when it is called.
    """
    found = {}
    for name, module, inside in walk(model):
        idle = isinstance(module, IDLE) or (
            isinstance(module, nn.Dropout) and not (module.training and module.p)
        )
        if state_of(module) is not None or not (inside or idle):
            found[name] = module
    return found


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module by qualified name, and whether it lies inside a fast layer."""
    fast: tuple[str, ...] = ()  # names of the fast layers so far, each with what follows a name
    for name, module in model.named_modules():
        yield name, module, bool(fast) and name.startswith(fast)
        if state_of(module) is not None:
            fast += (f"{name}." if name else "",)


def owner(name: str, layers: dict[str, Any]) -> str:
    """The innermost of the layers that holds the module of this name; the model at the latest."""
    while name not in layers and name:
        name = name.rpartition(".")[0]
    return name


def shown(layer: str) -> str:
    """A layer's name for people."""
    return layer or MODEL


class Timeline:
    """Marks of one model, taken while `watching()`.

    Args:
        model: eager or swapped.
        layers: what is told apart, of this model or (by name) of its swapped twin.
        read: the meter.
        on_call: told of every call of a layer or op: `on_call(place, module or op, inputs,
            output)`; for accounts, not for timing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        read: Callable[[], Any],
        on_call: Callable[[Place, Any, Any, Any], None] | None = None,
    ) -> None:
        self.model, self.layers = model, layers
        self.read, self.on_call = read, on_call
        self.names = {id(module): name for name, module in model.named_modules()}
        self.parameters = {
            id(parameter): name.rpartition(".")[0] for name, parameter in model.named_parameters()
        }
        self.stack = [OUTSIDE]
        self.marks: list[Mark] = []
        self.calls: dict[Place, int] = defaultdict(int)
        self.hooked: set[int] = set()  # tensors that have a backward mark, in this step

    # ----------------------------------------------------------------------------------- marks

    def _mark(self, place: Place, direction: str = FORWARD) -> None:
        self.marks.append(Mark(self.read(), place, direction))

    def _enter(self, place: Place, counts: bool = True) -> None:
        self.stack.append(place)
        self.calls[place] += counts
        self._mark(place)

    def _leave(self) -> None:
        self.stack.pop()
        self._mark(self.stack[-1])

    def _on_gradient(self, tree: Any, place: Place) -> None:
        """When the gradient of a tensor in the tree is complete, the backward of `place` begins."""
        for tensor in pytree.tree_leaves(tree):
            if not isinstance(tensor, Tensor) or not tensor.requires_grad:
                continue
            if tensor.grad_fn is None or id(tensor.grad_fn) in self.hooked:
                continue
            self.hooked.add(id(tensor.grad_fn))
            tensor.register_hook(lambda grad: self._mark(place, BACKWARD))

    # ---------------------------------------------------------------------------------- sources

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Take marks inside this block; the model is as before afterwards."""
        handles = []
        for name, module, inside in walk(self.model):
            if not inside:
                place = Place(owner(name, self.layers))
                before = self._before(place, counts=place.layer == name)
                handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(self._after(place), with_kwargs=True),
                ]
        try:
            with self._ops(), self._notes():
                self._mark(OUTSIDE)
                yield
                self._mark(OUTSIDE)
        finally:
            for handle in handles:
                handle.remove()
            self.hooked.clear()
            self.stack = [OUTSIDE]

    def _before(self, place: Place, counts: bool) -> Callable[..., None]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._on_gradient((args, kwargs), self.stack[-1])
            self._enter(place, counts)

        return before

    def _after(self, place: Place) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.on_call:
                self.on_call(place, module, (args, kwargs), output)
            self._on_gradient(output, place)
            self._leave()

        return after

    @contextmanager
    def _notes(self) -> Iterator[None]:
        """A fast layer inside another notes that it runs, and says no more."""
        original = FastLayer._count_call
        timeline = self

        def count_call(self: FastLayer) -> None:
            original(self)
            name = timeline.names.get(id(self))
            if name is not None and timeline.stack[-1].layer != name:
                place = Place(name)
                timeline.stack[-1] = place  # the outermost one's hook takes it off again
                timeline.calls[place] += 1
                timeline._mark(place)

        FastLayer._count_call = count_call  # type: ignore[method-assign]
        try:
            yield
        finally:
            FastLayer._count_call = original  # type: ignore[method-assign]

    @contextmanager
    def _ops(self) -> Iterator[None]:
        """Calls of our ops. One that has a parameter belongs to the layer that owns it."""
        original = Op.run
        timeline = self

        def run(self: Op, args: Any, name: str) -> Any:
            layer, child = timeline._owner_of(args)
            if child and len(timeline.stack) > 1:
                timeline.stack[-1] = Place(layer)
            op = f"{self.name} ({child})" if child else self.name
            place = Place(timeline.stack[-1].layer, op)
            timeline._on_gradient(tuple(args), timeline.stack[-1])
            timeline._enter(place)
            output = original(self, args, name)
            if timeline.on_call:
                timeline.on_call(place, self, args, output)
            timeline._on_gradient(output, place)
            timeline._leave()
            return output

        Op.run = run  # type: ignore[method-assign]
        try:
            yield
        finally:
            Op.run = original  # type: ignore[method-assign]

    def _owner_of(self, args: Any) -> tuple[str, str]:
        """The layer that has one of these parameters, and the name in it of who owns that."""
        for value in args:
            name = self.parameters.get(id(value)) if isinstance(value, nn.Parameter) else None
            if name is not None:
                layer = owner(name, self.layers)
                return layer, name.removeprefix(layer).lstrip(".") or name.rpartition(".")[2]
        return "", ""

    # ---------------------------------------------------------------------------------- results

    def parts(
        self, difference: Callable[[Any, Any], float] = lambda before, after: after - before
    ) -> dict[tuple[Place, str], float]:
        """What the meter gained at each place, by direction; the sum is the whole."""
        gained: dict[tuple[Place, str], float] = defaultdict(float)
        for mark, following in zip(self.marks, self.marks[1:], strict=False):
            gained[mark.place, mark.direction] += difference(mark.reading, following.reading)
        return dict(gained)


def takes(op: Op, args: Any) -> str:
    """The sizes that an op was given, as one short word group."""
    shape = "×".join(map(str, args[0].shape))
    fields = dict(zip(args._fields, args, strict=True))
    if "key" in fields and fields["key"].shape != args[0].shape:
        return f"{shape}, keys {'×'.join(map(str, fields['key'].shape))}"
    weight = fields.get("weight")
    if op.name == "linear" and weight is not None:
        return f"{shape} → {weight.shape[0]}"
    return shape


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor among the inputs of a call."""
    return next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)
