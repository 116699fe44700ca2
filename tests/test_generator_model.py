"""The generator's pieces: orders, heads, conditions, drawing, attention maps."""

import doctest
import gc
import math

import pytest
import torch
from generator_fakes import config, model

import patchgen_fast
from patchgen_fast.generator import interpretation, orders
from patchgen_fast.generator import model as model_module
from patchgen_fast.generator.heads import FlowHead, MeanHead, PixelHead, SamplingOptions
from patchgen_fast.generator.model import GeneratorConfig, Task, take_in_order
from patchgen_fast.generator.orders import drawing_order, given_first, spiral
from patchgen_fast.generator.sampling import drawing, noise_for, sample
from patchgen_fast.models import CONFIGS, patchify, unpatchify

RASTER = torch.arange(16)


def a_task(kind, order=RASTER):
    return {
        "class": Task(order),
        "completion": Task(order, seen=order[..., :6], given=6),
        "reconstruction": Task(order, seen=torch.arange(16)),
        "variation": Task(order, seen=torch.tensor([3, 9, 1]).expand(3, 3)),
    }[kind]


TASKS = ("class", "completion", "reconstruction", "variation")


# ------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (4, 1), (2, 3), (4, 4), (5, 5), (3, 7)])
def test_a_spiral_visits_every_place_once_and_never_jumps(grid):
    order = spiral(grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))
    rows, columns = order // grid[1], order % grid[1]
    assert ((rows.diff().abs() + columns.diff().abs()) == 1).all()


def test_a_spiral_begins_in_the_middle():
    assert spiral((5, 5))[0] == 12
    assert spiral((5, 5))[-1] == 0


def test_random_orders_are_permutations_that_differ():
    order = drawing_order("random", (4, 4), batch=8, generator=torch.Generator().manual_seed(0))
    assert (order.sort(dim=1).values == RASTER).all()
    assert len({tuple(row) for row in order.tolist()}) == 8


def test_given_places_move_to_the_front_and_the_others_keep_their_order():
    order = torch.tensor([[4, 2, 0, 1, 3], [0, 1, 2, 3, 4]])
    moved = given_first(order, torch.tensor([1, 2]))
    assert moved.tolist() == [[2, 1, 4, 0, 3], [1, 2, 0, 3, 4]]


@pytest.mark.parametrize("module", [orders, model_module])
def test_docstring_examples(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


# -------------------------------------------------------------------------------------- heads


def test_flow_carries_noise_to_the_data_it_was_trained_on():
    """Two states, two points: samples land on the point of their state."""
    torch.manual_seed(0)
    head = FlowHead(4, 2, width=32, depth=2, repeats=8)
    states = torch.eye(4)[:2].repeat(32, 1)
    targets = torch.tensor([[1.0, -0.5], [-1.0, 0.5]]).repeat(32, 1)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        times, noise = torch.rand(8, 64), torch.randn(8, 64, 1, 2)
        loss = head.loss(states[:, None], targets[:, None], times, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = head.sample(states, torch.randn(64, 2), SamplingOptions())
    assert (drawn - targets).square().mean().sqrt() < 0.15


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_integration_has_the_order_that_it_should(method, order):
    """dx/dt = x for one unit of time is a factor of e."""
    head = FlowHead(1, 1, width=4, depth=1, repeats=1).double()
    head.velocity = lambda x, modulations: x

    def error(steps):
        options = SamplingOptions(steps=steps, method=method)
        drawn = head.sample(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), options)
        return abs(drawn.item() - math.e)

    assert error(40) / error(80) == pytest.approx(2.0**order, rel=0.05)


def test_guidance_of_one_is_none_and_of_zero_ignores_the_condition():
    head = MeanHead(4, 2)
    told, untold = torch.randn(2, 3, 4)
    noise = torch.zeros(3, 2)
    both = torch.cat((told, untold))
    zero = head.sample(both, noise, SamplingOptions(guidance=0.0))
    torch.testing.assert_close(zero, head.out(untold))
    two = head.sample(both, noise, SamplingOptions(guidance=2.0))
    torch.testing.assert_close(two, 2 * head.out(told) - head.out(untold))


def test_pixels_are_drawn_with_the_probabilities_of_the_head():
    head = PixelHead(2, 1, 4, torch.tensor([-1.0]), torch.tensor([1.0]))
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    with torch.no_grad():
        head.out.weight.zero_()
        head.out.bias.copy_(probabilities.log())
    noise = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    drawn = head.sample(torch.zeros(20000, 2), noise, SamplingOptions())
    levels = ((drawn + 1) / 2 * 3).round().long().flatten()
    shares = levels.bincount(minlength=4) / 20000
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    most_likely = head.sample(torch.zeros(5, 2), noise[:5], SamplingOptions(temperature=0.0))
    torch.testing.assert_close(most_likely, torch.ones(5, 1))


def test_cross_entropy_is_least_at_the_true_level():
    head = PixelHead(2, 1, 3, torch.tensor([-1.0]), torch.tensor([1.0]))
    losses = []
    for level in range(3):
        with torch.no_grad():
            head.out.weight.zero_()
            head.out.bias.copy_(10.0 * torch.eye(3)[level])
        losses.append(head.loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1), None, None).item())
    assert losses.index(min(losses)) == 1 and min(losses) < 1e-3


# --------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("order", ["raster", "spiral", "random"])
def test_a_patch_depends_on_what_is_known_only(order):
    """States change with patches drawn before and with seen ones, and with no others."""
    made = model(order=order)
    places = drawing_order(order, (4, 4), batch=1, generator=torch.Generator().manual_seed(3))
    places = places.reshape(-1, 16)[0]
    images = torch.rand(1, 1, 8, 8)
    task = Task(places, seen=places[:4], given=4)

    def states(images):
        memory = made.memory(torch.tensor([10]), images, task.seen)
        drawn = take_in_order(patchify(images, 2), task.order)
        return made.states(drawn[:, :-1], task.order, memory)

    patches = patchify(images, 2)
    patches[:, places[9]] += 0.5
    before, after = states(images), states(unpatchify(patches, 4))
    assert torch.equal(before[:, :10], after[:, :10])
    assert (before[:, 10:] != after[:, 10:]).any(dim=2).all()


def test_the_label_changes_the_memory_and_none_is_a_label():
    made = model()
    memory = made.memory(torch.tensor([0, 1, made.none]))
    assert memory.shape == (3, 1, 16)
    assert not torch.equal(memory[0], memory[2])


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("heads", [("flow", "mse"), ("pixels",)])
def test_losses_and_gradients_of_every_task(kind, heads):
    made = model(heads=heads)
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 5, 10])
    losses = made(images, labels, a_task(kind), torch.rand(1, 3), torch.randn(1, 3, 16, 4))
    assert tuple(losses) == heads
    sum(losses.values()).backward()
    unused = {
        name for name, p in made.named_parameters() if p.grad is None or not p.grad.count_nonzero()
    }
    encoder = {name for name, _ in made.named_parameters() if name.startswith("encoder.")}
    assert unused - {"decoder.pos_embed"} == (encoder if kind == "class" else set())


def test_given_patches_carry_no_loss():
    made = model()
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    task = Task(RASTER, given=15)
    points = torch.rand(1, 2), torch.randn(1, 2, 16, 4)
    before = made(images, labels, task, *points)["mse"]
    states = made.states(patchify(images, 2)[:, :-1], RASTER, made.memory(labels))[:, 15:]
    target = made.to_patch_vectors(patchify(images, 2)[:, 15:])
    torch.testing.assert_close(before, (made.heads["mse"].out(states) - target).square().mean())


# ------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize("order", ["raster", "spiral", "random"])
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_drawing_with_a_cache_equals_whole_passes(order, kind, guidance):
    made = model(order=order).double()
    places = drawing_order(order, (4, 4), batch=3, generator=torch.Generator().manual_seed(1))
    images = torch.rand(3, 1, 8, 8).double()
    arguments = (
        made,
        torch.tensor([1, 2, 10]),
        a_task(kind, places),
        noise_for(made, 3, 0).double(),
    )
    how = {"options": SamplingOptions(guidance=guidance, steps=2)}
    cached = sample(*arguments, images, **how)
    whole = sample(*arguments, images, use_cache=False, **how)
    torch.testing.assert_close(cached, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [("flow", "mse"), ("pixels",), ("mse",)])
def test_swapped_draws_what_eager_draws(heads):
    made, labels = model(heads=heads), torch.arange(4)
    images = torch.rand(4, 1, 8, 8)
    task = Task(RASTER, seen=RASTER[:5], given=5)
    how = {"options": SamplingOptions(guidance=1.5)}
    eager = sample(made, labels, task, noise_for(made, 4, 7), images, **how)
    with patchgen_fast.swapped(made):
        fast = sample(made, labels, task, noise_for(made, 4, 7), images, **how)
    if heads == ("pixels",):  # rounding may move a level here and there
        assert (fast - eager).abs().gt(1e-4).float().mean() < 0.02
    else:
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-4)


def test_the_swapped_flow_head_has_the_same_loss_and_gradients():
    head = model(flow_depth=2, flow_repeats=3).heads["flow"].double()
    states, targets = torch.randn(4, 5, 16).double(), torch.randn(4, 5, 4).double()
    draws = torch.rand(3, 4).double(), torch.randn(3, 4, 5, 4).double()

    def loss_and_gradients():
        inputs = [states.clone().requires_grad_(), targets.clone().requires_grad_()]
        loss = head.loss(*inputs, *draws)
        return loss, *torch.autograd.grad(loss, [*inputs, *head.parameters()])

    eager = loss_and_gradients()
    with patchgen_fast.swapped(head):
        assert type(head).__name__ == "FastFlowHead"
        assert type(head.state_modulation).__name__ == "FastLinear"
        fast = loss_and_gradients()
        assert head._fast.calls == 3
    torch.testing.assert_close(fast, eager, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_swapped_flow_head_draws_the_same_patches(method, guidance):
    """In double precision, where only the formula counts: nearly to the last digit."""
    head = model(flow_depth=2).heads["flow"].double()
    states, noise = torch.randn(6, 16).double(), torch.randn(6, head.out.out_features).double()
    options = SamplingOptions(guidance, 0.7, steps=3, method=method)
    noise = noise[:3] if guidance != 1.0 else noise

    def drawn():
        draw = head.sampler(options)
        return draw(states, noise), draw(states.flip(0), noise), head.sample(states, noise, options)

    with torch.inference_mode():
        eager = drawn()
        with patchgen_fast.swapped(head):
            fast = drawn()
            assert head._fast.calls == 3 * options.steps * (2 if method == "heun" else 1)
            assert head.blocks[0]._fast.calls == head._fast.calls
    torch.testing.assert_close(fast, eager, rtol=1e-12, atol=1e-12)


def test_a_new_sampler_sees_what_was_written_to_any_weight():
    """What a sampler keeps is gone with it."""
    head = model(flow_depth=2).heads["flow"]
    patchgen_fast.swap(head)
    states, noise = torch.randn(3, 16), torch.randn(3, head.out.out_features)
    options = SamplingOptions(steps=2)
    with torch.inference_mode():
        drawn = [head.sampler(options)(states, noise)]
        for parameter in head.parameters():
            parameter.mul_(1.5)
            drawn.append(head.sampler(options)(states, noise))
    assert all(not torch.equal(one, next) for one, next in zip(drawn, drawn[1:], strict=False))


def test_a_hook_inside_the_swapped_flow_head_is_called_for_every_evaluation():
    head = model(flow_depth=2).heads["flow"]
    patchgen_fast.swap(head)
    seen = []
    inner = (head.input, head.norm, head.blocks[0], head.blocks[1].fc1, head.blocks[1].act)
    for module in inner:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    with torch.inference_mode():
        head.sample(
            torch.randn(3, 16), torch.randn(3, head.out.out_features), SamplingOptions(steps=2)
        )
    calls = [sum(one is module for one in seen) for module in inner]
    assert calls == [4, 12, 4, 4, 4]


def test_equal_seeds_draw_equal_images_in_batches_of_any_size():
    made, labels = model(), torch.arange(7) % 10
    task, noise = Task(RASTER), noise_for(made, 7, 3)
    whole = sample(made, labels, task, noise)
    torch.testing.assert_close(sample(made, labels, task, noise, batch=3), whole)
    assert not torch.equal(sample(made, labels, task, noise_for(made, 7, 4)), whole)
    assert sample(made, labels[:0], task, noise[:0]).shape == (0, 1, 8, 8)


def test_given_patches_are_kept_and_the_rest_is_not_looked_at():
    made = model()
    images = torch.rand(2, 1, 8, 8)
    other = images.clone()
    other[:, :, 4:] = 0
    task, labels = Task(RASTER, seen=RASTER[:8], given=8), torch.tensor([10, 10])
    drawn = sample(made, labels, task, noise_for(made, 2, 0), images)
    assert torch.equal(drawn[:, :, :4], images[:, :, :4])
    assert torch.equal(sample(made, labels, task, noise_for(made, 2, 0), other), drawn)
    everything = Task(RASTER, seen=RASTER, given=16)
    assert torch.equal(sample(made, labels, everything, noise_for(made, 2, 0), images), images)


@pytest.mark.parametrize("fast", [False, True])
def test_memory_is_constant_after_the_second_step(fast):
    made = model()
    if fast:
        patchgen_fast.swap(made)
    sizes = []
    gc.collect()
    gc.freeze()  # what is there already is not looked at again
    try:
        for _ in drawing(made, torch.arange(6), Task(RASTER), noise_for(made, 6, 0)):
            gc.collect()
            found = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
            sizes.append(sum({x.data_ptr(): x.nbytes() for x in found}.values()))
    finally:
        gc.unfreeze()
    assert len(sizes) == 16
    assert len(set(sizes[2:])) == 1


# ----------------------------------------------------------------------------- attention maps


@pytest.mark.parametrize("fast", [False, True])
def test_attention_maps_are_the_weights_that_the_layers_use(fast):
    """Weights times values give what the layer gives."""
    made = model()
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([3, 10])
    task = Task(RASTER, seen=RASTER)
    layer = made.encoder.layers[0].attn
    seen = {}
    layer.register_forward_hook(lambda m, inputs, out: seen.update(x=inputs[0], out=out))
    if fast:
        patchgen_fast.swap(made)
    maps = interpretation.attention_maps(made, images, labels, task)
    value = layer.qkv(seen["x"]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)[2]
    by_maps = layer.proj((maps.encoder[0] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(by_maps, seen["out"], rtol=1e-4, atol=1e-5)
    assert [m.shape for m in maps.decoder] == [(2, 2, 16, 16)] * 2
    assert [m.shape for m in maps.cross] == [(2, 2, 16, 17)] * 2
    assert maps.decoder[0].triu(1).count_nonzero() == 0
    for weights in (*maps.encoder, *maps.decoder, *maps.cross):
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_weights_on_the_grid_lie_at_their_places():
    weights = torch.tensor([[0.5, 0.2, 0.3]])
    picture = interpretation.on_grid(weights, torch.tensor([3, 0, 1, 2]), (2, 2), skip=1)
    assert picture[0, 1, 1] == weights[0, 1] and picture[0, 0, 0] == weights[0, 2]
    assert picture[0].isnan().sum() == 2


def test_pictures_of_attention_are_written(tmp_path):
    made = model()
    task = Task(RASTER, seen=RASTER[:8], given=8)
    paths = interpretation.save_maps(
        tmp_path, made, torch.rand(1, 1, 8, 8), torch.tensor([10]), task, place=5
    )
    assert {path.name for path in paths} == {"decoder.png", "cross.png", "encoder.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: sample(m, torch.tensor([11]), Task(RASTER), noise_for(m, 1, 0)), "from 0 to 9"),
        (lambda m: sample(m, torch.tensor([-1]), Task(RASTER), noise_for(m, 1, 0)), "from 0 to 9"),
        (
            lambda m: sample(m, torch.tensor([1]), Task(RASTER), noise_for(m, 1, 0), head="pixels"),
            "a head out of flow, mse, got 'pixels'",
        ),
        (
            lambda m: sample(m, torch.tensor([1]), Task(RASTER, given=3), noise_for(m, 1, 0)),
            "expected images",
        ),
        (lambda m: config(heads=()), "heads out of flow, pixels, mse"),
        (lambda m: config(heads=("gan",)), "heads out of flow, pixels, mse"),
        (lambda m: config(order="zigzag"), "order out of raster, spiral, random"),
        (lambda m: config(levels=1), "levels of at least 2"),
        (lambda m: GeneratorConfig(CONFIGS["vit_b_16"]), "no prefix tokens"),
    ],
)
def test_wrong_input_says_what_was_expected(call, match):
    with pytest.raises(ValueError, match=match):
        call(model())
