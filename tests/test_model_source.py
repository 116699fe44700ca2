"""MODEL on the command line: every form makes a model that takes its inputs; errors help."""

from __future__ import annotations

import importlib

import pytest
import torch

from patchgen_fast import model_source


def importable(name):
    try:
        importlib.import_module(name)
    except Exception as error:  # built for another torch, it fails in ways of its own
        pytest.skip(f"{name} can't be imported: {error}")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def bare():\n    return nn.Linear(4, 4)\n"
        "def complete():\n    return nn.Linear(4, 4), torch.ones(3, 4)\n"
        "def named():\n    return nn.Linear(4, 4), {'input': torch.ones(2, 4)}\n"
        "def wrong():\n    return 'model'\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    import sys

    sys.modules.pop("my_models", None)


def test_our_models_take_their_inputs():
    source = model_source.find("patchgen:tiny")
    model = source.model(dtype=torch.bfloat16, seed=3)
    args, kwargs = source.inputs(model, 2, dtype=torch.bfloat16)
    assert source.image_shape == (3, 16, 16) and not kwargs and not model.training
    assert args[0].shape == (2, 3, 16, 16) and args[0].dtype == torch.bfloat16
    assert model(*args).shape == (2, 3, 16, 16)
    again = source.model(dtype=torch.bfloat16, seed=3)
    for mine, theirs in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("timm:vit_tiny_patch16_224", (3, 224, 224)),
        ("torchvision:vit_b_16", (3, 224, 224)),
        ("torchvision:inception_v3", (3, 299, 299)),
    ],
)
def test_libraries_say_the_size_of_an_image(name, shape):
    importable(name.partition(":")[0])
    source = model_source.find(name)
    assert source.image_shape == shape
    with torch.device("meta"):
        model = source.make().eval()
        out = model(*source.inputs(model, 2, device="meta").args)
    assert out.shape == (2, 1000)


@pytest.mark.parametrize(
    "name, inputs",
    [
        ("ViTConfig", {"pixel_values": (2, 3, 224, 224)}),
        ("CLIPConfig", {"pixel_values": (2, 3, 224, 224), "input_ids": (2, 64)}),
        ("VideoMAEConfig", {"pixel_values": (2, 16, 3, 224, 224)}),
    ],
)
def test_transformers_configurations(name, inputs):
    importable("transformers")
    source = model_source.find(f"transformers:{name}")
    with torch.device("meta"):
        model = source.make()
    args, kwargs = source.inputs(model, 2, device="meta")
    assert args == () and {key: tuple(x.shape) for key, x in kwargs.items()} == inputs


@pytest.mark.parametrize("name, rows", [("complete", 3), ("named", 2)])
def test_a_callable_brings_its_inputs(own, name, rows):
    source = model_source.find(f"my_models:{name}")
    model = source.model(dtype=torch.float64)
    args, kwargs = source.inputs(model, dtype=torch.float64)
    assert model(*args, **kwargs).shape == (rows, 4)


def test_a_callable_without_inputs_serves_until_they_are_asked_for(own):
    source = model_source.find("my_models:bare")
    model = source.model()
    with pytest.raises(ValueError, match=r"returns no inputs; let it return \(model, inputs\)"):
        source.inputs(model)


@pytest.mark.parametrize(
    "name, text",
    [
        ("vit_b_16", "expected a model as timm:NAME"),
        ("patchgen:", "expected a model as timm:NAME"),
        ("tim:vit_b_16", "no library or module 'tim'.*did you mean timm"),
        ("patchgen:vit_b16", "no model 'vit_b16'; expected one of tiny.*did you mean vit_b_16"),
        ("my_models:complet", "no callable 'complet'; did you mean complete"),
        ("my_models:number", "no callable 'number'"),
    ],
)
def test_a_wrong_name_says_what_is_near(own, name, text):
    with pytest.raises(ValueError, match=text):
        model_source.find(name)


@pytest.mark.parametrize(
    "name, near",
    [
        ("timm:vit_base_patch16_22", "vit_base_patch16_224"),
        ("timm:vit_base_patch16_224.augreg_in22k", "vit_base_patch16_224.augreg_in21k"),
        ("torchvision:vit_b16", "vit_b_16"),
        ("transformers:VitConfig", "ViTConfig"),
    ],
)
def test_a_wrong_name_of_a_library_says_what_is_near(name, near):
    importable(name.partition(":")[0])
    with pytest.raises(ValueError, match=f"has no .*did you mean .*{near}"):
        model_source.find(name)


@pytest.mark.parametrize("error, text", [
    (ModuleNotFoundError("No module named 'timm'", name="timm"), "timm is not installed; pip"),
    (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "install what it needs"),
    (RuntimeError("operator torchvision::nms does not exist"), "a build that fits torch"),
])  # fmt: skip
def test_a_library_that_can_not_be_imported(monkeypatch, error, text):
    def fail(name):
        raise error

    monkeypatch.setattr(model_source, "import_module", fail)
    with pytest.raises(ValueError, match=text):
        model_source.find("timm:vit_base_patch16_224")


def test_a_callable_must_return_a_module(own):
    with pytest.raises(ValueError, match=r"expected a torch.nn.Module, or a pair.* got str"):
        model_source.find("my_models:wrong").model()


def test_a_batch_is_at_least_one():
    source = model_source.find("patchgen:tiny")
    with pytest.raises(ValueError, match="batch of at least 1, got 0"):
        source.inputs(source.model(), 0)
