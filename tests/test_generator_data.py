"""Data sets in their formats on disk, augmentation, and how good images are told."""

import pickle

import numpy as np
import pytest
import torch
from generator_fakes import write_cifar10, write_image

from patchgen_fast.generator.augment import augment
from patchgen_fast.generator.data import open_data, read_image, split
from patchgen_fast.generator.evaluation import Judge, nearest_distance, psnr, ssim
from patchgen_fast.generator.files import FileError

RGB8 = {"image_size": (8, 8), "channels": 3}


def test_digits_are_all_there_and_a_fifth_is_held_out():
    data = open_data("digits", image_size=(8, 8), channels=1)
    assert (len(data.train), len(data.held_out)) == (1438, 359)
    assert data.classes == tuple("0123456789") and data.levels == 17
    assert data.train.images.shape == (1438, 1, 8, 8)
    assert data.train.images.min() == 0 and data.train.images.max() == 1
    larger = open_data("digits", image_size=(16, 16), channels=3)
    assert larger.held_out.images.shape == (359, 3, 16, 16)
    assert torch.equal(larger.held_out.labels, data.held_out.labels)


def test_parts_are_disjoint_and_the_same_in_every_run():
    kept, held = split(23)
    assert len(held) == 4
    assert sorted(torch.cat((kept, held)).tolist()) == list(range(23))
    assert torch.equal(split(23)[1], held)


def test_a_folder_of_images_without_classes(tmp_path):
    for number in range(10):
        write_image(tmp_path / f"{number}.png", value=20 * number)
    (tmp_path / "notes.txt").write_text("no image")
    data = open_data(f"folder:{tmp_path}", **RGB8)
    assert data.classes == () and data.train.labels is None
    assert (len(data.train), len(data.held_out)) == (8, 2)
    images = data.train.load(torch.arange(8))
    assert images.shape == (8, 3, 8, 8) and images.dtype == torch.uint8
    named = [20 * int(path.stem) for path in data.train.paths]
    assert images.float().mean(dim=(1, 2, 3)).tolist() == named
    assert data.train.labels_of(torch.arange(3)).tolist() == [0, 0, 0]


def test_subfolders_are_classes(tmp_path):
    for name, value in (("cat", 10), ("ant", 200)):
        for number in range(5):
            write_image(tmp_path / name / f"{number}.jpg", value=value)
    data = open_data(f"folder:{tmp_path}", **RGB8)
    assert data.classes == ("ant", "cat")
    images = data.train.load(torch.arange(len(data.train)))
    brightness = images.float().mean(dim=(1, 2, 3))
    assert torch.equal(data.train.labels, (brightness < 100).long())


def test_imagenet_folders(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for wnid in ("n01440764", "n01443537"):
            for number in range(count):
                write_image(tmp_path / part / wnid / f"{wnid}_{number}.JPEG", (20, 14))
    data = open_data(f"imagenet:{tmp_path}", **RGB8)
    assert data.classes == ("n01440764", "n01443537")
    assert (len(data.train), len(data.held_out)) == (6, 4)
    assert data.held_out.labels.tolist() == [0, 0, 1, 1]
    write_image(tmp_path / "val" / "n09999999" / "x.JPEG")
    with pytest.raises(FileError, match="also n09999999"):
        open_data(f"imagenet:{tmp_path}", **RGB8)


def test_cifar10_planes_lie_where_they_should(tmp_path):
    first = write_cifar10(tmp_path)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = open_data(f"cifar10:{root}", image_size=(32, 32), channels=3)
        assert (len(data.train), len(data.held_out)) == (20, 4)
        assert data.train.images[1, 2, 3, 5] == first[1, 2 * 1024 + 3 * 32 + 5]
        assert data.classes[3] == "class3"
        assert data.train.labels.dtype == torch.int64


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    write_cifar10(tmp_path)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(FileError, match="print has no place"):
        open_data(f"cifar10:{tmp_path}", image_size=(32, 32), channels=3)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda folder: (folder / "data_batch_3").unlink(), "data_batch_3 .* unpack"),
        (lambda folder: (folder / "data_batch_3").write_bytes(b"\x80\x02}q"), "cannot read"),
        (lambda folder: (folder / "test_batch").write_bytes(pickle.dumps([1])), "expected a dict"),
        (lambda folder: (folder / "test_batch").write_bytes(pickle.dumps({})), "uint8 data"),
        (
            lambda folder: (folder / "test_batch").write_bytes(
                pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]})
            ),
            "labels below 10",
        ),
    ],
)
def test_damaged_cifar10_says_which_file(tmp_path, change, match):
    write_cifar10(tmp_path)
    change(tmp_path / "cifar-10-batches-py")
    with pytest.raises(FileError, match=match):
        open_data(f"cifar10:{tmp_path}", image_size=(32, 32), channels=3)


def test_unreadable_images_are_skipped_and_counted_or_an_error(tmp_path):
    for number in range(10):
        write_image(tmp_path / f"{number}.png")
    data = open_data(f"folder:{tmp_path}", **RGB8)
    broken = data.train.paths[3]
    broken.write_bytes(broken.read_bytes()[:60])
    loaded = data.train.load(torch.tensor([3, 4, 3]))
    assert torch.equal(loaded[0], loaded[1])
    assert data.train.unreadable == {broken}
    strict = open_data(f"folder:{tmp_path}", strict=True, **RGB8)
    with pytest.raises(FileError, match=f"cannot read {broken} as an image"):
        strict.train.load(torch.tensor([strict.train.paths.index(broken)]))


def test_a_folder_of_broken_images_is_an_error(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    data = open_data(f"folder:{tmp_path}", **RGB8)
    with pytest.raises(FileError, match="none can be read"):
        data.train.load(torch.tensor([0]))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("mnist", "digits, folder:PATH, cifar10:PATH or imagenet:PATH, got 'mnist'"),
        ("folder:", "a folder after 'folder:', got 'nothing'"),
        ("folder:/not/there", "got '/not/there'"),
        ("imagenet:{tmp}", "expected a folder .*train"),
        ("folder:{tmp}", "expected images .* got none"),
    ],
)
def test_wrong_data_says_what_was_expected(tmp_path, spec, match):
    with pytest.raises(ValueError, match=match):
        open_data(spec.format(tmp=tmp_path), **RGB8)


def test_cifar10_has_one_size(tmp_path):
    write_cifar10(tmp_path)
    with pytest.raises(ValueError, match="32 x 32 with 3 channels"):
        open_data(f"cifar10:{tmp_path}", image_size=(16, 16), channels=3)


def test_an_image_of_another_size_is_an_error_unless_it_may_be_fitted(tmp_path):
    write_image(tmp_path / "wide.png", (12, 8), value=77)
    with pytest.raises(ValueError, match="expected an image of 8 x 8, got 8 x 12 .*--resize"):
        read_image(tmp_path / "wide.png", (8, 8), 3)
    fitted = read_image(tmp_path / "wide.png", (8, 8), 3, fit=True)
    assert fitted.shape == (3, 8, 8) and (fitted == 77).all()
    assert read_image(tmp_path / "wide.png", (8, 12), 1).shape == (1, 8, 12)
    with pytest.raises(FileError, match="no such file"):
        read_image(tmp_path / "none.png", (8, 8), 3)


# ------------------------------------------------------------------------------- augmentation


def test_augmentation_is_reproducible_and_leaves_some_images_alone():
    images = torch.rand(64, 1, 8, 8)

    def changed(kind, seed=0):
        return augment(
            images, kind, torch.rand(7, 64, generator=torch.Generator().manual_seed(seed))
        )

    assert torch.equal(changed("none"), images)
    assert torch.equal(changed("affine"), changed("affine"))
    assert not torch.equal(changed("affine"), changed("affine", 1))
    same = (changed("affine") == images).flatten(1).all(dim=1)
    assert 3 < same.sum() < 30
    flipped = changed("flip")
    is_same = (flipped == images).flatten(1).all(dim=1)
    is_mirrored = (flipped == images.flip(-1)).flatten(1).all(dim=1)
    assert (is_same | is_mirrored).all() and 15 < is_mirrored.sum() < 50
    assert changed("affine").min() >= 0 and changed("affine").max() <= 1
    with pytest.raises(ValueError, match="none, flip, affine"):
        changed("twist")


# ------------------------------------------------------------------------------------ figures


def test_psnr_of_a_known_error():
    truth = torch.zeros(2, 1, 4, 4)
    images = truth + torch.tensor([0.1, 0.01])[:, None, None, None]
    torch.testing.assert_close(psnr(images, truth), torch.tensor([20.0, 40.0]))


def test_ssim_by_its_formula_in_one_window():
    """Images of one window: the definition, written out with numpy."""
    chance = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 1, 7, 7, generator=chance)
    x, y = a.double().flatten().numpy(), b.double().flatten().numpy()
    covariance = np.cov(x, y)
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * x.mean() * y.mean() + c1) * (2 * covariance[0, 1] + c2)
    below = (x.mean() ** 2 + y.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
    assert ssim(a, b).item() == pytest.approx(above / below, rel=1e-6)
    assert ssim(a, a).item() == pytest.approx(1.0)
    assert ssim(torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)).shape == (3,)


def test_nearest_distance_of_copies_is_zero():
    training = torch.rand(30, 1, 8, 8)
    assert nearest_distance(training[4:9], training).max() == 0
    assert nearest_distance(training[:1] + 0.5, training).item() > 0.5


def test_the_judge_reads_held_out_digits():
    data = open_data("digits", image_size=(8, 8), channels=1)
    judge = Judge(data.train.images, data.train.labels)
    accuracy = (judge(data.held_out.images) == data.held_out.labels).float().mean()
    assert accuracy > 0.97
