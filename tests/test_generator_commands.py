"""`patchgen-fast train` and `generate`: what they write, and what they say of bad input."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

from generator_fakes import write_image

from patchgen_fast.cli import main
from patchgen_fast.generator import pictures

SMALL = ["--dim", "16", "--depth", "1", "--decoder-depth", "1", "--device", "cpu", "--quiet"]


def run(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def pixels_of(path):
    """The grey pixels of a picture, int64, row by row."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).long().flatten()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps on digits, with everything that a run leaves."""
    out = tmp_path_factory.mktemp("run")
    run("train", *SMALL, "--steps", 4, "--evaluate-every", 2, "--samples", 20, "--out", out)
    return out


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    """A picture of 8 x 8, grey."""
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    Image.linear_gradient("L").resize((8, 8)).save(path)
    return path


def test_a_run_leaves_checkpoints_log_samples_curves_and_an_evaluation(trained):
    assert [path.name for path in (trained / "checkpoints").iterdir()] == ["step-00000004"]
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("evaluation", 2),
        ("train", 4),
        ("evaluation", 4),
    ]
    assert {"loss", "loss_flow", "loss_mse", "lr", "images_per_second"} <= lines[1].keys()
    assert {"loss class", "loss reconstruction", "unreadable"} <= lines[0].keys()
    with Image.open(trained / "samples-00000004.png") as sheet:
        assert sheet.width > sheet.height > 64
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = json.loads((trained / "evaluation.json").read_text())
    assert table["classifier, held-out images"] > 0.97
    assert 0 <= table["classifier, samples as asked"] <= 1
    assert table["nearest training image, ratio"] > 0
    assert "reconstruction, PSNR in dB" in table and "reconstruction, SSIM" in table


def test_a_run_is_not_overwritten(trained):
    told = run("train", *SMALL, "--steps", 4, "--out", trained, status=2)
    assert "holds a run already: pass --resume" in told


def test_a_run_resumes_only_as_what_it_was(trained):
    told = run("train", *SMALL, "--steps", 4, "--lr", 1, "--out", trained, "--resume", status=1)
    assert "lr 0.002 -> 1.0" in told and "another --out" in told
    more_heads = [*SMALL, "--heads", 2, "--steps", 4, "--out", trained, "--resume"]
    assert "the model's shape" in run("train", *more_heads, status=1)
    assert "a folder without one" in run(
        "train", *SMALL, "--resume", "--out", trained / "checkpoints", status=1
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--data", "mnist"], "digits, folder:PATH"),
        (["--data", "folder:/not/there"], "expected a folder after 'folder:'"),
        (["--batch", "5000"], "at most the 1438 training images"),
        (["--accumulate", "3"], "choose a multiple of 3"),
        (["--head", "gan"], "heads out of flow, pixels, mse"),
        (["--patch-size", "3"], "multiples of the patch"),
        (["--steps", "0"], "steps of at least 1"),
    ],
)
def test_what_cannot_be_trained(tmp_path, options, match):
    told = run("train", *SMALL, *options, "--out", tmp_path / "run", status=1)
    assert match in told and "Traceback" not in told


def test_a_folder_with_an_unreadable_image_trains_and_counts_it_or_stops(tmp_path):
    for number in range(10):
        write_image(tmp_path / "images" / f"{number}.png")
    for number in (2, 3, 4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    how = ["--data", f"folder:{tmp_path / 'images'}", "--image-size", 8, "--patch-size", 4,
           "--heads", 2, "--batch", 6, "--steps", 2, *SMALL]  # fmt: skip
    told = run("train", *how, "--out", tmp_path / "run")
    assert "unreadable images were skipped" in told
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 1 <= last["unreadable"] <= 3
    told = run("train", *how, "--strict", "--out", tmp_path / "strict", status=1)
    assert "as an image" in told


# ------------------------------------------------------------------------------------ generate


def test_classes_are_drawn_on_a_sheet_as_files_and_moving(trained, tmp_path):
    told = run(
        "generate", trained, "--class", "3", "--count", 4, "--columns", 2, "--out",
        tmp_path / "sheet.png", "--singles", tmp_path / "singles",
        "--animation", tmp_path / "drawn.gif", "--device", "cpu",
    )  # fmt: skip
    assert str(tmp_path / "sheet.png") in told
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (2 * 66 + 2, 2 * 66 + 2)
    assert len(list((tmp_path / "singles").iterdir())) == 4
    with Image.open(tmp_path / "singles" / "image-0003.png") as single:
        assert single.size == (8, 8) and single.mode == "L"
    with Image.open(tmp_path / "drawn.gif") as drawn:
        assert drawn.n_frames == 17


def test_equal_seeds_draw_equal_files_and_eager_what_swapped_draws(trained, tmp_path):
    def pixels(name, *options):
        run("generate", trained, "--count", 3, "--out", tmp_path / name, *options)
        return pixels_of(tmp_path / name)

    one = pixels("1.png", "--seed", 5)
    assert torch.equal(one, pixels("2.png", "--seed", 5))
    assert not torch.equal(one, pixels("3.png", "--seed", 6))
    assert (one - pixels("4.png", "--seed", 5, "--eager")).abs().max() <= 1


def test_a_completion_keeps_the_part_that_is_given(trained, digit, tmp_path):
    run("generate", trained, "--complete", digit, "--given", 0.5, "--count", 2,
        "--singles", tmp_path, "--out", tmp_path / "sheet.png")  # fmt: skip
    before, after = pixels_of(digit), pixels_of(tmp_path / "image-0001.png")
    assert torch.equal(before[:32], after[:32]) and not torch.equal(before[32:], after[32:])


def test_reconstruction_variations_and_attention(trained, digit, tmp_path):
    run("generate", trained, "--variations", digit, "--count", 3, "--out", tmp_path / "v.png")
    run("generate", trained, "--reconstruct", digit, "--head", "mse", "--count", 1,
        "--out", tmp_path / "r.png", "--attention", tmp_path / "maps", "--place", 5)  # fmt: skip
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {
        "decoder.png",
        "cross.png",
        "encoder.png",
    }


def test_a_larger_picture_is_an_error_unless_it_may_be_resized(trained, tmp_path):
    write_image(tmp_path / "large.png", (30, 20))
    how = ["generate", trained, "--reconstruct", tmp_path / "large.png", "--count", 1]
    told = run(*how, "--out", tmp_path / "o.png", status=1)
    assert "expected an image of 8 x 8, got 20 x 30" in told and "--resize" in told
    run(*how, "--out", tmp_path / "o.png", "--resize")


@pytest.mark.parametrize(
    ("options", "status", "match"),
    [
        (["--class", "10"], 1, "expected a class out of 0, 1, 2"),
        (["--class", "seven"], 1, "or a number from 0 to 9, got 'seven'"),
        (["--class", "1", "--variations", "x.png"], 2, "at most one of --class, --variations"),
        (["--complete", "none.png"], 1, "cannot read none.png: no such file"),
        (["--given", "1.5"], 2, "--given: expected a share from 0 to 1"),
        (["--count", "0"], 2, "--count: expected at least 1"),
        (["--head", "pixels"], 1, "a head out of flow, mse, got 'pixels'"),
        (["--animation", "x.mp4"], 1, "*.gif or *.png"),
        (["--out", "/proc/none/sheet.png"], 1, "cannot write /proc/none/sheet.png"),
    ],
)
def test_what_cannot_be_generated(trained, tmp_path, monkeypatch, options, status, match):
    monkeypatch.chdir(tmp_path)
    told = run("generate", trained, *options, status=status)
    assert match in told and "Traceback" not in told


def test_a_missing_or_foreign_checkpoint(tmp_path):
    assert "no such folder" in run("generate", tmp_path / "none", status=1)
    (tmp_path / "generator.json").write_text('{"kind": "another"}')
    assert "got 'another', version None" in run("generate", tmp_path, status=1)


# ------------------------------------------------------------------------------------ pictures


def test_tiles_of_a_sheet_lie_row_by_row():
    images = torch.arange(6).reshape(6, 1, 1, 1).expand(6, 1, 2, 2) / 10
    whole = pictures.sheet(images, columns=4, scale=3)
    assert whole.shape == (2 * 8 + 2, 4 * 8 + 2, 1)
    assert whole[2 + 8 + 1, 2 + 8 + 1, 0] == round(255 * 0.5)
    assert whole[-1, -1, 0] == pictures.BACKGROUND


def test_rows_are_interleaved_in_blocks_of_columns():
    a, b = torch.arange(5)[:, None, None, None], -torch.arange(5)[:, None, None, None]
    mixed = pictures.interleaved(a, b, columns=3).flatten().tolist()
    assert mixed == [0, 1, 2, 0, -1, -2, 3, 4, -3, -4]
