"""`swap` held against every attention model of a library: what is replaced, and is it right?

    python benchmarks/sweep.py timm                 # resumes where it stopped
    python benchmarks/sweep.py timm --shard 0/2     # half of it; the files of shards join
    python benchmarks/sweep.py timm --table         # the table alone, from what is there

Every model is built on the meta device. Those with attention are then built small (one block a
stage, few patches), with random weights, and run: eager and swapped are counted while they run, so
that "fully" means that no softmax, no attention of torch and no convolution that cuts patches was
left; and `verify` holds the results against float64.

A line of JSON a model goes to `benchmarks/results/sweep-LIBRARY.jsonl` as soon as it is done.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import patchgen_fast
from patchgen_fast import dispatch
from patchgen_fast._torchvision import make_importable
from patchgen_fast.swapping import VerifyReport, swap, verify

RESULTS = Path(__file__).parent / "results"
STATUSES = ("fully", "partly", "refused")
ATTENTIONS = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
)
CONVOLUTIONS = (F.conv2d, F.conv3d)
SAMPLE = 10  # one model of so many is run in bfloat16 and with gradients too
MOST_PARAMETERS = 60_000_000  # of a model that is run; larger ones are left out, and said to be
EXACT_ZERO = 1e-12  # of the largest gradient: what float64 leaves of a 0
MANY_PARAMETERS = 8_000_000  # from here on, one image and one run of `verify`


class Counting(TorchFunctionMode):
    """Counts what torch is asked for: attentions, and convolutions that cut an image in patches."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = 0
        self.patch_convolutions = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ATTENTIONS:
            self.attentions += 1
        elif func in CONVOLUTIONS and _cuts_patches(*args, **kwargs):
            self.patch_convolutions += 1
        return func(*args, **kwargs)


def _cuts_patches(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    kernel = tuple(weight.shape[2:])
    strides = (stride,) * len(kernel) if isinstance(stride, int) else tuple(stride)
    unpadded = padding in (0, "valid") or not any(padding)
    return weight.shape[1] <= 4 and strides == kernel and max(kernel) > 1 and unpadded


@dataclass
class Entry:
    """What was found for one model."""

    name: str
    status: str
    swapped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """Layers that stayed as they were, by class: the reason."""
    eager: tuple[int, int] | None = None
    """Attentions and patch convolutions that the eager model runs."""
    remaining: tuple[int, int] | None = None
    """Those that the swapped model still leaves to torch."""
    parity: str = ""
    sampled: str = ""
    """Verdict with gradients, and in bfloat16, of the models of the sample."""
    note: str = ""
    seconds: float = 0.0


def examine(
    name: str,
    build: Callable[[], nn.Module],
    small: Callable[[nn.Module], tuple[nn.Module, tuple[Any, ...]] | None],
) -> Entry:
    """One model, from the meta device to the verdict."""
    begin = time.monotonic()
    with torch.device("meta"):
        whole = build()
    report = swap(whole, dry_run=True)
    if not any(row.kind == "attention" for row in report.rows):
        return Entry(name, "no attention")
    kinds = Counter(row.kind for row in report.with_action("would swap") if row.kind != "layer")
    left = {
        row.cls: row.reason
        for row in report.with_action("refused", "unsupported")
        if row.kind in ("attention", "patch_embed")
    }
    entry = Entry(name, "refused", dict(kinds), left)
    if kinds["attention"] or kinds["patch_embed"]:
        torch.manual_seed(0)
        _run(entry, small(whole))
    entry.seconds = round(time.monotonic() - begin, 2)
    return entry


def _run(entry: Entry, small: tuple[nn.Module, tuple[Any, ...]] | None) -> None:
    if small is None:
        entry.status, entry.note = "partly", "not run: it can't be built small"
        return
    model, arguments = _lively(small[0].eval()), small[1]
    with torch.no_grad():
        with Counting() as eager:
            model(*arguments)
        with patchgen_fast.swapped(model), Counting() as fast, dispatch.counting() as ran:
            model(*arguments)
    entry.eager = (eager.attentions, eager.patch_convolutions)
    entry.remaining = (fast.attentions, fast.patch_convolutions)
    ours = sum(n for call, n in ran.items() if call.startswith(("attention.", "patch_embed.")))
    if ours:
        entry.status = "partly" if any(entry.remaining) else "fully"
    runs = 1 if sum(p.numel() for p in model.parameters()) > MANY_PARAMETERS else 3
    report = verify(model, *arguments, gradients=False, runs=runs)
    if report.swapped_layers == 0:
        entry.status, entry.note = "partly", "not run: built small, it has no attention"
        return
    entry.parity = report.verdict
    if not report.ok:
        entry.note = str(report)
    if zlib.crc32(entry.name.encode()) % SAMPLE == 0:
        verdicts = [verify(model, *arguments)]
        half = [x.bfloat16() if x.is_floating_point() else x for x in arguments]
        verdicts.append(verify(model.bfloat16(), *half, gradients=False, runs=runs))
        entry.sampled = ", ".join(_verdict(report) for report in verdicts)
        entry.note += "\n".join(str(report) for report in verdicts if not report.ok)


def _verdict(report: VerifyReport) -> str:
    """The report's verdict; apart from gradients that are exactly 0 in exact arithmetic.

    A bias that shifts all scores of a head alike changes nothing. Its gradient is rounding and
    nothing else, in ours and in eager, and which of two roundings is larger means nothing.
    """
    largest = max((p.scale for p in report.gradients), default=0.0)
    wrong = [p for p in report.failures() if not p.scale <= EXACT_ZERO * largest]
    return report.verdict if wrong or report.ok else f"pass but for {len(report.failures())} zeros"


@torch.no_grad()
def _lively(model: nn.Module) -> nn.Module:
    """Zeros and tiny scales, as new models have them, would hide mistakes."""
    for parameter in model.parameters():
        if parameter.numel() and (parameter.dim() < 2 or parameter.std() < 1e-3):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# ------------------------------------------------------------------------------------------- timm


def timm_models() -> list[str]:
    make_importable()
    import timm

    return list(timm.list_models())


def examine_timm(name: str) -> Entry:
    import timm

    def build(**kwargs: Any) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=10, **kwargs)

    def small(whole: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]] | None:
        """The model with the first of these changes that it takes and runs with."""
        stages = max(len(getattr(whole, part, ())) for part in ("layers", "stages"))
        shallow: list[dict[str, Any]] = [
            {"depth": 1, **_four_heads(whole)},
            {"depth": 1},
            {"depths": (1,) * stages},
            {"serial_depths": (1,) * 4, "parallel_depth": 1},
            {"depth": ((1, 1, 0),) * 3},  # CrossViT's
            {},
        ]
        sizes: list[dict[str, Any]] = [{"img_size": _patch_side(whole) * 5}, {"img_size": 64}, {}]
        for change in (change | size for change in shallow for size in sizes):
            try:
                with torch.device("meta"), torch.no_grad():
                    candidate = build(**change).eval()
                    candidate(*inputs(candidate, change))
            except Exception:
                continue
            if sum(p.numel() for p in candidate.parameters()) <= MOST_PARAMETERS:
                model = build(**change)
                return model, inputs(model, change)
        return None

    def inputs(model: nn.Module, change: dict[str, Any]) -> tuple[torch.Tensor]:
        config: Any = model.pretrained_cfg
        size = (change["img_size"],) * 2 if "img_size" in change else config["input_size"][1:]
        many = sum(p.numel() for p in model.parameters()) > MANY_PARAMETERS
        return (torch.randn(1 if many else 2, 3, *size),)

    return examine(name, build, small)


def _four_heads(model: Any) -> dict[str, int]:
    """The width of four of the model's heads, where it has plain blocks."""
    try:
        heads = model.blocks[0].attn.num_heads
    except (AttributeError, IndexError, TypeError):
        return {}
    width = getattr(model, "embed_dim", None)
    if not isinstance(width, int) or width % heads or heads <= 4:
        return {}
    return {"embed_dim": 4 * (width // heads), "num_heads": 4}


def _patch_side(model: nn.Module) -> int:
    size = getattr(getattr(model, "patch_embed", None), "patch_size", 16)
    return int(size if isinstance(size, int) else max(size))


# ----------------------------------------------------------------------------------- transformers


def transformers_models() -> list[str]:
    """Configuration classes whose base model takes images, and images first."""
    make_importable()
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = []
    for kind, named in MODEL_MAPPING_NAMES.items():
        for model in (named,) if isinstance(named, str) else named:
            try:
                takes = inspect.signature(getattr(transformers, model).forward).parameters
            except Exception:  # it needs a package that is not here
                continue
            if list(takes)[1:2] in (["pixel_values"], ["pixel_values_videos"]):
                found.append(CONFIG_MAPPING_NAMES[kind])
                break
    return sorted(set(found))


def examine_transformers(name: str) -> Entry:
    import transformers

    config_class = getattr(transformers, name)

    def build(**changes: Any) -> nn.Module:
        model: nn.Module = transformers.AutoModel.from_config(config_class(**changes))
        return model

    def small(whole: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor]] | None:
        side = getattr(config_class(), "patch_size", 8)
        side = 4 * (side if isinstance(side, int) else max(side))
        narrow = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        one = {"num_hidden_layers": 1}
        for change in (
            {**narrow, **one, "image_size": side},
            {**narrow, **one, "image_size": [side, side]},
            {**one, "image_size": side},
            {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32},
            one,
            {},
        ):
            try:
                with torch.device("meta"), torch.no_grad():
                    candidate = build(**change).eval()
                    candidate(*inputs(candidate))
            except Exception:
                continue
            if sum(p.numel() for p in candidate.parameters()) <= MOST_PARAMETERS:
                model = build(**change)
                return model, inputs(model)
        return None

    def inputs(model: Any) -> tuple[torch.Tensor]:
        size = getattr(model.config, "image_size", None) or 224
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        frames = getattr(model.config, "num_frames", getattr(model.config, "frames_per_clip", None))
        shape = (frames, 3) if frames else (getattr(model.config, "num_channels", 3),)
        return (torch.randn(1, *shape, height, width),)

    return examine(name, build, small)


LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Entry]]] = {
    "timm": (timm_models, examine_timm),
    "transformers": (transformers_models, examine_transformers),
}


# ------------------------------------------------------------------------------- running, results


def _guarded(examine_one: Callable[[str], Entry], name: str) -> Entry:
    try:
        return examine_one(name)
    except Exception as error:  # a model that fails is a finding, and the others are still wanted
        return Entry(name, "error", note=f"{type(error).__name__}: {error}"[:2000])


def run(library: str, shard: tuple[int, int], match: str, quiet: bool) -> Path:
    """Examine what is not in the file yet; the file's path."""
    names, examine_one = LIBRARIES[library]
    index, count = shard
    part = "" if count == 1 else f".{index}of{count}"
    path = RESULTS / f"sweep-{library}{part}.jsonl"
    done = {entry["name"] for entry in read(library)}
    todo = [n for i, n in enumerate(names()) if i % count == index and match in n and n not in done]
    cut_off = path.exists() and not path.read_text().endswith("\n")
    with path.open("a") as file:
        file.write("\n" if cut_off else "")
        for name in _progress(todo, quiet):
            file.write(json.dumps(asdict(_guarded(examine_one, name))) + "\n")
            file.flush()
    return path


def _progress(names: list[str], quiet: bool):
    """The names, with a bar on a terminal and a line for every 25 elsewhere."""
    if quiet:
        yield from names
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(names, "models", console=Console(stderr=True))
    else:
        for i, name in enumerate(names):
            if i % 25 == 0:
                print(f"[{i}/{len(names)}] {name}", file=sys.stderr, flush=True)
            yield name


def read(library: str) -> list[dict[str, Any]]:
    """All entries of a library, of whatever shard; a line cut off by an interruption is redone."""
    entries: dict[str, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob(f"sweep-{library}*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            entries[entry["name"]] = entry
    return sorted(entries.values(), key=lambda entry: entry["name"])


def table(library: str) -> str:
    """Markdown: the sums, then the reasons, then whatever failed."""
    entries = [entry for entry in read(library) if entry["status"] != "no attention"]
    counts = Counter(entry["status"] for entry in entries)
    verdicts = Counter(entry["parity"] for entry in entries if entry["parity"])
    sampled = Counter(entry["sampled"] for entry in entries if entry["sampled"])
    reasons: dict[tuple[str, str], int] = Counter(
        (cls, reason) for entry in entries for cls, reason in entry["left"].items()
    )
    lines = [
        f"# swap over {library}",
        "",
        f"{len(entries)} models with attention: "
        + ", ".join(f"{counts[status]} {status}" for status in (*STATUSES, "error"))
        + ". Fully: while it runs, no softmax, no attention of torch and no convolution that cuts "
        "an image into patches is left. Written by `python benchmarks/sweep.py "
        f"{library} --table`.",
        "",
        f"Parity against float64 in float32: {_sums(verdicts)}. "
        f"Sample with gradients, and in bfloat16: {_sums(sampled)}. (Zeros: gradients of biases "
        "that shift all scores of a head alike: 0 in exact arithmetic, rounding in both models.)",
        "",
        "| class that stays as it is | reason | models |",
        "|---|---|---|",
        *(f"| {cls} | {why} | {n} |" for (cls, why), n in reasons.most_common()),  # type: ignore[attr-defined]
    ]
    wrong = [e for e in entries if e["parity"] == "fail" or "fail" in e["sampled"]]
    odd = [e for e in entries if e["status"] == "error" or e["note"].startswith("not run")]
    for title, listed in (("Parity failures", wrong), ("Not examined", odd)):
        if listed:
            lines += ["", f"## {title}", ""]
            lines += [f"- {e['name']}: {e['note'].splitlines()[0]}" for e in listed]
    for status in STATUSES:
        names = [e["name"] for e in entries if e["status"] == status]
        lines += ["", f"## {status.capitalize()} ({len(names)})", "", ", ".join(names)]
    return "\n".join(lines) + "\n"


def _sums(counts: Counter) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.most_common()) or "none"


def _shard(_context: Any, _parameter: Any, text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise click.BadParameter(f"expected INDEX/COUNT as 0/2, got {text!r}")
    return int(index), int(count)


@click.command()
@click.argument("library", type=click.Choice(list(LIBRARIES)))
@click.option("--shard", default="0/1", callback=_shard, help="Part of the models, as 0/2 and 1/2.")
@click.option("--match", default="", help="Only models whose name holds this.")
@click.option("--table", "only_table", is_flag=True, help="Run nothing, write the table.")
@click.option("--quiet", is_flag=True, help="No progress.")
def main(library: str, shard: tuple[int, int], match: str, only_table: bool, quiet: bool) -> None:
    """Hold `swap` against every attention model of LIBRARY. Exit status 3: parity failures."""
    if not only_table:
        run(library, shard, match, quiet)
    text = table(library)
    path = RESULTS / f"sweep-{library}.md"
    path.with_suffix(".md.part").write_text(text)
    path.with_suffix(".md.part").replace(path)
    click.echo(text.split("\n| class")[0])
    failed = any(e["parity"] == "fail" or "fail" in e["sampled"] for e in read(library))
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main()
