"""How good a generator is: losses, likeness of reconstructions, and whether samples are what was
asked for and new.

Whether a sample shows its class is judged by a classifier that has seen real training images only:
a support vector machine on pixels (scikit-learn), whose own accuracy on held-out images stands
beside. Whether samples are copies shows in their distance to the nearest training image, as a share
of that distance of held-out images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import REMEDY, Data, ImageSet
from .files import FileError
from .heads import SamplingOptions
from .model import PatchGenerator, Task
from .orders import drawing_order, given_first
from .sampling import noise_for, sample
from .tasks import SHARES, Step, new_task, seeded

JUDGE_IMAGES = 5000  # the classifier learns from at most that many
LOSS_IMAGES = 512
COMPLETE = SamplingOptions(temperature=0.3)


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image `[B, C, H, W]` on the scale 0 to 1: `[B]`."""
    return -10 * (images - truth).square().flatten(1).mean(dim=1).clamp(min=1e-12).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of each image `[B, C, H, W]`, scale 0 to 1: `[B]`.

    Windows of 7 x 7 (smaller images: the largest odd side that fits) with equal weights and
    unbiased variances, over all places where a window fits.
    """
    side = min(7, *images.shape[2:])
    side -= 1 - side % 2
    count = side * side

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, side, stride=1)

    a, b = images.double(), truth.double()
    mean_a, mean_b = mean(a), mean(b)
    unbiased = count / max(1, count - 1)
    var_a = unbiased * (mean(a * a) - mean_a.square())
    var_b = unbiased * (mean(b * b) - mean_b.square())
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    likeness = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
    return likeness.flatten(1).mean(dim=1).float()


def nearest_distance(images: Tensor, training: Tensor) -> Tensor:
    """Euclidean distance of each image `[B, C, H, W]` to the nearest training image: `[B]`."""
    training = training.flatten(1)
    parts = [
        torch.cdist(part.flatten(1), training, compute_mode="donot_use_mm_for_euclid_dist")
        for part in images.split(256)
    ]
    return torch.cat([part.amin(dim=1) for part in parts])


class Judge:
    """A classifier of pixels, trained on real images `[n, C, H, W]` and labels `[n]`."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise FileError(f"the classifier comes with scikit-learn: {REMEDY}") from error
        self._classifier = SVC(C=10.0, gamma="scale")
        self._classifier.fit(images.flatten(1).numpy(), labels.numpy())

    def __call__(self, images: Tensor) -> Tensor:
        """The classes that it reads, int64 `[B]`."""
        found = self._classifier.predict(images.cpu().flatten(1).numpy())
        return torch.from_numpy(found).long()


def pixels(data: ImageSet, count: int) -> tuple[Tensor, Tensor]:
    """The first images as floats from 0 to 1 `[n, C, H, W]`, and their labels `[n]`."""
    indices = torch.arange(min(count, len(data)))
    images = data.load(indices)
    images = images / 255 if images.dtype == torch.uint8 else images
    return images, data.labels_of(indices)


@torch.inference_mode()
def held_out_loss(model: PatchGenerator, data: ImageSet, *, seed: int = 0) -> dict[str, float]:
    """The loss of each task, summed over the heads, on held-out images with the noise of a seed."""
    images, labels = pixels(data, LOSS_IMAGES)
    device = model.label.weight.device
    config, repeats = model.config, model.config.flow_repeats
    found = {}
    for number, kind in enumerate(SHARES):
        chance = seeded(seed, -1 - number)
        batch = len(images)
        task = new_task(kind, config, batch, chance)
        told = labels if kind == "class" else torch.full_like(labels, model.none)
        shape = (repeats, batch, config.transformer.num_patches, config.patch_dim)
        times = torch.rand(repeats, batch, generator=chance)
        step = Step(images, told, task, times, torch.randn(shape, generator=chance))
        losses = model(*step.rows(slice(None), device)[:5])
        found[kind] = float(sum(losses.values()))
    return found


def evaluate(
    model: PatchGenerator,
    data: Data,
    *,
    count: int = 500,
    seed: int = 0,
    options: SamplingOptions,
) -> dict[str, float]:
    """The whole table, by name; what needs classes is left out where there are none.

    Args:
        model: in eval mode.
        data: what it learned from, and what was held out.
        count: samples of classes, and at most that many held-out images.
        seed: of the samples.
        options: how samples are drawn.
    """
    truth, labels = pixels(data.held_out, count)
    training, training_labels = pixels(data.train, JUDGE_IMAGES)
    table = {f"loss, {kind}": loss for kind, loss in held_out_loss(model, data.held_out).items()}

    rebuilt = reconstruct(model, truth, seed=seed)
    table["reconstruction, PSNR in dB"] = psnr(rebuilt, truth).mean().item()
    table["reconstruction, SSIM"] = ssim(rebuilt, truth).mean().item()

    real = nearest_distance(truth, training).median().item()
    asked = torch.arange(count) % max(1, len(data.classes))
    order = drawing_order(
        model.config.order,
        model.config.transformer.grid_size,
        batch=count,
        generator=seeded(seed, 0),
    )
    drawn = sample(model, asked, Task(order), noise_for(model, count, seed), options=options)
    table["nearest training image, held-out images"] = real
    table["nearest training image, samples"] = nearest_distance(drawn, training).median().item()
    table["nearest training image, ratio"] = table["nearest training image, samples"] / real

    if data.classes:
        judge = Judge(training, training_labels)
        completed = complete_upper(model, truth, 0.5, seed=seed)
        table["classifier, held-out images"] = _share(judge(truth) == labels)
        table["classifier, samples as asked"] = _share(judge(drawn) == asked)
        table["classifier, completions as the original"] = _share(judge(completed) == labels)
    return table


def reconstruct(model: PatchGenerator, images: Tensor, *, seed: int = 0) -> Tensor:
    """Images `[B, C, H, W]` drawn anew from what the encoder makes of them, by the head "mse".

    By the model's first head, at temperature 0, where there is no such head.
    """
    batch = len(images)
    labels = torch.full((batch,), model.none)
    grid = model.config.transformer.grid_size
    order = drawing_order(model.config.order, grid, batch=batch, generator=seeded(seed, 1))
    task = Task(order, seen=torch.arange(model.config.transformer.num_patches))
    head = "mse" if "mse" in model.heads else None
    options = SamplingOptions(temperature=0.0)
    return sample(
        model, labels, task, noise_for(model, batch, seed), images, head=head, options=options
    )


def complete_upper(
    model: PatchGenerator,
    images: Tensor,
    share: float,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    options: SamplingOptions = COMPLETE,
) -> Tensor:
    """Images `[B, C, H, W]` of which the first share of patches, in order, is kept."""
    task = completion_task(model, share, batch=len(images), seed=seed)
    labels = torch.full((len(images),), model.none) if labels is None else labels
    return sample(model, labels, task, noise_for(model, len(images), seed), images, options=options)


def completion_task(model: PatchGenerator, share: float, *, batch: int, seed: int) -> Task:
    """Given the first share of the patches: rows from the top, or the middle of a spiral.

    Raises ValueError for a share that is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected a given share from 0 to 1, got {share}")
    config = model.config
    grid, patches = config.transformer.grid_size, config.transformer.num_patches
    given = round(share * patches)
    order = drawing_order(config.order, grid, batch=batch, generator=seeded(seed, 2))
    if config.order == "random":
        order = given_first(order, torch.arange(given))
    return Task(order, seen=order[..., :given] if given else None, given=given)


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()
