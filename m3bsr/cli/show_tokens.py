"""``tools/show_tokens.py IMAGES...``: which patches of photographs a model keeps, fuses and loses, drop by drop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torchvision import tv_tensors

from m3bsr.backbones import DENSE_NAMES, TaskViTMixin, load_weights
from m3bsr.bsr import SELECTORS, keep_rates_of_training
from m3bsr.build import build_backbone, transform_of
from m3bsr.cli.common import one_line_errors, open_run, pick_device
from m3bsr.cli.predict import upright
from m3bsr.config import Config, replace
from m3bsr.plan import FUSE, SCORE_SOURCE, Plan
from m3bsr.report.collect import denormalise
from m3bsr.report.tokens import FORMATS, TokenRow, save_tokens, tokens_left

DESCRIPTION = """
Draw a row per photograph: what the network sees, then for each drop block the kept patches as they are, the patches
within fused tokens, and those merged into kept ones, in the colour of their weight, and lost ones in black.
"""
# Options that a run answers itself, and their values without one.
OF_THE_MODEL: dict[str, Any] = {
    "model": "deit_tiny_patch16_224",
    "weights": "timm",
    "train_blocks": (),
    "drop_blocks": (3, 6, 9),
    "keep_rate": (0.5,),
    "fuse": "sum",
    "select": "score",
    "score_source": "own",
    "size": (224,),
}


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture, print the numbers of tokens and its path; exit code 0, or 2 for a user error."""
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    for path in args.images:  # complain before the model is built
        if not path.is_file():
            raise FileNotFoundError(f"missing file: {path}")
    if args.out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {args.out}: the name must end in {', '.join(FORMATS)}")
    device = pick_device(args.device)
    config, backbone = _of_run(args) if args.run else _of_model(args)
    if not backbone.plan.drop_blocks:  # of the method: most put the plan of the config aside
        method = "" if config.model.method == "bsr" else f" (method {config.model.method})"
        raise ValueError(f"nothing to show: {args.run or '--drop-blocks'}{method} names no block that drops tokens")
    if config.bsr.drop_from == "backward":
        raise ValueError(
            "nothing to show: drops of this run leave the backward pass only, and evaluation sees all tokens"
        )
    backbone = backbone.to(device).eval()
    rows = [row for path in args.images for row in show(backbone, config, path)]
    print("\n".join(token_lines(rows)))
    save_tokens(rows, args.out)
    print(args.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/show_tokens.py", description=DESCRIPTION)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--run", type=Path, help="run folder, or a checkpoint folder in one: its model and its plan")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best", "previous"), help="of the run")
    parser.add_argument("--model", help=f"timm VisionTransformer (default {OF_THE_MODEL['model']})")
    parser.add_argument("--weights", help='file, or "timm" for its pretrained ones (the default)')
    blocks: dict[str, Any] = {"type": int, "nargs": "*", "metavar": "BLOCK"}
    parser.add_argument("--drop-blocks", help="blocks that drop (default 3 6 9)", **blocks)
    parser.add_argument("--keep-rate", type=float, nargs="+", metavar="RATE", help="one, or one per block (default .5)")
    parser.add_argument("--fuse", choices=FUSE, help="what becomes of dropped tokens (default sum)")
    parser.add_argument("--select", choices=tuple(SELECTORS), help="which tokens are kept (default score)")
    parser.add_argument("--score-source", choices=SCORE_SOURCE, help="whose attention scores (default own)")
    parser.add_argument("--train-blocks", help='blocks that train; they do not score with "frozen"', **blocks)
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="side, or height and width (default 224)")
    parser.add_argument("--out", type=Path, default=Path("tokens.png"), help="the picture (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser


def _of_run(args: argparse.Namespace) -> tuple[Config, TaskViTMixin]:
    given = [f"--{name.replace('_', '-')}" for name in OF_THE_MODEL if getattr(args, name) is not None]
    if given:
        raise ValueError(f"--run has a model and a plan of its own; leave out {', '.join(given)}")
    config, model, _ = open_run(args.run, args.checkpoint)
    return config, model.backbone


def _of_model(args: argparse.Namespace) -> tuple[Config, TaskViTMixin]:
    """A timm model under a plan, as the backbone of a config like any other."""
    chosen = {n: default if getattr(args, n) is None else getattr(args, n) for n, default in OF_THE_MODEL.items()}
    if len(chosen["size"]) > 2:
        raise ValueError(f"--size takes one number, or height and width, got {len(chosen['size'])}")
    rates = tuple(chosen["keep_rate"])
    plan = Plan(
        train_blocks=tuple(chosen["train_blocks"]),
        drop_blocks=tuple(chosen["drop_blocks"]),
        keep_rate=rates[0] if len(rates) == 1 else rates,
        fuse=chosen["fuse"],
        select=chosen["select"],
        score_source=chosen["score_source"],
    )
    fields = {"data.name": "image_folder", "data.tasks": ("classification",), "moe.blocks": (), "bsr": plan}
    size = (chosen["size"][0], chosen["size"][-1])
    config = replace(Config(), {**fields, "model.backbone": chosen["model"], "data.image_size": size})
    backbone = build_backbone(config)
    if chosen["weights"] == "timm":
        name = DENSE_NAMES.get(chosen["model"], chosen["model"])
        try:
            state = timm.create_model(name, pretrained=True).state_dict()
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(f"no pretrained weights of {name} ({error}); give a file with --weights") from None
        load_weights(backbone, state, name=name)
    else:
        load_weights(backbone, chosen["weights"])
    backbone.set_plan(plan)
    return config, backbone


def show(backbone: TaskViTMixin, config: Config, path: str | Path) -> Iterator[TokenRow]:
    """What became of the tokens of the photo at ``path``: one row, or one per group of tasks that dropped the same.

    Raises:
        FileNotFoundError, ValueError: missing, no image, or truncated.
    """
    transform = transform_of(config, train=False)
    picture = tv_tensors.Image(upright(Path(path)).transpose(2, 0, 1).copy())
    image = transform({"image": picture})["image"].as_subclass(Tensor)
    with torch.inference_mode(), keep_rates_of_training(backbone):
        output = backbone.forward_tasks(image[None].to(next(backbone.parameters()).device), restored=False)
    photo = denormalise(image, **transform.normalisation)
    rows: dict[bytes, tuple[list[str], TokenRow]] = {}
    for task, stages in output.stages.items():
        steps = tokens_left(stages, 0)
        key = b"".join(part.tobytes() for step in steps for part in (step.fused_FP, step.kept_P, step.merged_P))
        rows.setdefault(key, ([], TokenRow(Path(path).name, photo, output.grid, steps)))[0].append(task)
    for tasks, row in rows.values():
        name = row.name if len(rows) == 1 else f"{row.name}: {', '.join(tasks)}"
        yield TokenRow(name, row.photo, row.grid, row.steps)


def token_lines(rows: Sequence[TokenRow]) -> list[str]:
    """Numbers of tokens after each drop, over all rows."""
    lines = []
    for i in range(max(len(row.steps) for row in rows)):
        steps = [row.steps[i] for row in rows if i < len(row.steps)]
        names = ("num_kept", "num_fused", "num_merged", "num_lost")
        kept, fused, merged, lost = (_span(getattr(s, name) for s in steps) for name in names)
        line = f"block {steps[0].block}: {_span(s.num_tokens for s in steps)} tokens"
        line += f", {kept} of {len(steps[0].kept_P)} patches kept, {fused} fused tokens"
        line += f", {merged} patches merged" if any(s.num_merged for s in steps) else ""
        line += f", {lost} patches lost"
        lines.append(line)
    return lines or ["no drop: every token is kept"]


def _span(values: Iterator[int]) -> str:
    numbers = set(values)
    return str(min(numbers)) + (f" to {max(numbers)}" if len(numbers) > 1 else "")
