"""``tools/extract_task.py RUN --task TASK``: one task of a trained run as a model of its own.

It keeps the task's head, its gates, and the experts that it uses on the validation set; the rest of the backbone is
shared and stays. What comes out is a run folder: ``tools/evaluate.py`` and ``tools/predict.py`` open it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m3bsr.build import build_datasets, build_model, build_tasks
from m3bsr.cli.common import metrics_table, one_line_errors, open_run, pick_device, write_json
from m3bsr.config import Config, replace
from m3bsr.cost import count_macs
from m3bsr.engine.checkpoint import save_checkpoint, verify_checkpoint
from m3bsr.engine.evaluate import Metrics, evaluate
from m3bsr.engine.loader import eval_loader
from m3bsr.models import MultiTaskModel
from m3bsr.moe import MoEMlp
from m3bsr.moe.extract import check_threshold, keep_experts, used_experts
from m3bsr.moe.gates.slots import SlotGate
from m3bsr.utils.lookup import lookup

REPORT = "extract.json"
Experts = dict[int, tuple[int, ...]]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder and print what became smaller; exit code 0, or 2 for a user error."""
    parser = argparse.ArgumentParser(prog="tools/extract_task.py", description="One task as a model of its own.")
    parser.add_argument("run", type=Path, help="run folder, or a checkpoint folder in one")
    parser.add_argument("--task", required=True, help="the task to keep")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.001,
        help="drop experts with less than this share of the task's choices on the validation set; 0 keeps all",
    )
    parser.add_argument("--out", type=Path, help="folder to write, RUN-TASK by default")
    parser.add_argument("--checkpoint", default="last", choices=("last", "best", "previous"), help="which one")
    parser.add_argument("--root", help="where the data lies now, if it was moved")
    parser.add_argument("--max-val", type=int, help="measure on only the first so many images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--num-workers", type=int)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    out = args.out or args.run.resolve().with_name(f"{args.run.resolve().name}-{args.task}")
    report = extract_run(
        args.run,
        args.task,
        out,
        threshold=args.threshold,
        checkpoint=args.checkpoint,
        device=args.device,
        changes={
            "data.root": args.root,
            "data.max_val": args.max_val,
            "data.num_workers": args.num_workers,
            "train.eval_batch_size": args.batch_size,
        },
    )
    print(as_text(report))
    print(out)
    return 0


def extract_run(
    run: str | Path,
    task: str,
    out: str | Path,
    *,
    threshold: float = 0.001,
    checkpoint: str = "last",
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Extract, measure before and after on the validation set, and write the run folder ``out``.

    Args:
        threshold: least share of the task's choices for an expert to stay; at least ``top_k`` of them do.
        changes: dotted config fields to set otherwise for the measurement (``data.root`` ...); None: as it was.

    Returns:
        What ``extract.json`` holds: ``experts`` kept per block, and ``before``, ``after`` with ``num_params``,
        ``bytes`` (of the weights), ``gmacs`` of the task for an image, ``metrics``; of the whole run also
        ``gmacs_all_tasks``.

    Raises:
        FileNotFoundError, ValueError: no run, no data, an unknown task, a bad threshold, or ``out`` is there already.
    """
    out = Path(out)
    check_threshold(threshold)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; remove it, or choose another folder with --out")
    where = pick_device(device)
    config, model, folder = open_run(run, checkpoint)
    lookup(dict.fromkeys(config.data.tasks), task, f"task of {run}")
    model.to(where)
    measured = replace(config, {name: value for name, value in (changes or {}).items() if value is not None})
    measured = config_of(measured, task, {})
    before = _evaluate(measured, model, where, progress)
    kept = experts_to_keep(model, task, before.expert_counts, threshold)
    small_config = replace(config_of(config, task, kept), {"run.dir": str(out)})
    small = extract(model, task, kept, small_config).to(where)
    after = _evaluate(measured, small, where, progress)
    image = torch.randn(1, 3, *config.data.image_size, device=where)
    report = {
        "source": str(folder),
        "task": task,
        "threshold": threshold,
        "num_images": before.num_images,
        "protocol": before.protocol,
        "experts": {str(block): list(ids) for block, ids in kept.items()},
        "before": {
            **_size(model),
            "gmacs_all_tasks": _gmacs(model, image, model.tasks),
            "gmacs": _gmacs(model, image, (task,)),
            "metrics": before[task],
        },
        "after": {**_size(small), "gmacs": _gmacs(small, image, (task,)), "metrics": after[task]},
    }
    step = {"step": verify_checkpoint(folder)}
    save_checkpoint(out / "checkpoints" / "last", model=small.cpu(), config=small_config.to_dict(), progress=step)
    write_json(out / "config.json", small_config.to_dict())
    write_json(out / REPORT, report)
    return report


def experts_to_keep(
    model: MultiTaskModel, task: str, counts: Mapping[int, Mapping[str, Tensor]], threshold: float
) -> Experts:
    """Per MoE block the ids of the experts that ``task`` uses (see :func:`m3bsr.moe.extract.used_experts`)."""
    kept: Experts = {}
    for block in model.backbone.moe_blocks:
        mlp = _mlp(model, block)
        slots = any(isinstance(gate, SlotGate) for gate in mlp.gates.values())
        kept[block] = used_experts(counts[block][task], mlp.top_k, threshold, mlp.windows.get(task), slots)
    return kept


def config_of(config: Config, task: str, experts: Experts) -> Config:
    """The config of a model for ``task`` alone; with these experts in each MoE block where any are given."""
    changes: dict[str, Any] = {
        "data.tasks": (task,),
        "data.sets": {name: value for name, value in config.data.sets.items() if name == task},
        "data.num_classes": {name: value for name, value in config.data.num_classes.items() if name == task},
        "loss.weights": {name: value for name, value in config.loss.weights.items() if name == task},
    }
    if experts:
        changes |= {
            "moe.blocks": tuple(experts),
            "moe.num_experts": tuple(map(len, experts.values())),
            "moe.experts_per_task": None,
            "moe.expert_parallel": 1,
            "bsr.train_experts": _train_experts(config, experts),
        }
    return replace(
        config, {**changes, "model.refine_dim": 0, "model.weights": "", "run.resume": False, "run.overwrite": False}
    )


def _train_experts(config: Config, experts: Experts) -> Any:
    """Which of the kept experts train, by their new numbers."""
    old = config.bsr.train_experts
    if isinstance(old, str):
        return old
    trained = [b for b in experts if config.bsr.train_blocks == "all" or b in config.bsr.train_blocks]
    if len(trained) != len(old):  # another method than bsr, which has no use for the field
        return "all"
    return tuple(
        tuple(new for new, expert in enumerate(experts[block]) if expert in ids)
        for block, ids in zip(trained, old, strict=True)
    )


def extract(model: MultiTaskModel, task: str, experts: Experts, config: Config) -> MultiTaskModel:
    """A new model for ``task`` alone, on the CPU, with the weights of ``model``.

    Args:
        experts: ids to keep in each MoE block, ascending.
        config: of the new model, from :func:`config_of`.
    """
    small = build_model(config)
    state = {key: tensor.cpu() for key, tensor in model.state_dict().items()}
    for block, ids in experts.items():
        prefix = f"backbone.blocks.{block}.mlp."
        layer = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
        layer = keep_experts(layer, ids, task, _mlp(model, block).tasks)
        state |= {prefix + key: tensor for key, tensor in layer.items()}
    others = ("refinement.", *(f"heads.{name}." for name in model.tasks if name != task))
    small.load_state_dict({key: tensor for key, tensor in state.items() if not key.startswith(others)})
    return small


def _mlp(model: MultiTaskModel, block: int) -> MoEMlp:
    mlp: Any = model.backbone.blocks[block].mlp
    assert isinstance(mlp, MoEMlp)
    return mlp


def _evaluate(config: Config, model: MultiTaskModel, device: torch.device, progress: bool) -> Metrics:
    _, val_set = build_datasets(config)
    loader = eval_loader(val_set, batch_size=config.train.eval_batch_size, num_workers=config.data.num_workers)
    return evaluate(model, build_tasks(config), loader, device, config.train.precision, progress)


def _size(model: MultiTaskModel) -> dict[str, int]:
    tensors = model.state_dict().values()
    num_params = sum(p.numel() for p in model.parameters())
    return {"num_params": num_params, "bytes": sum(t.numel() * t.element_size() for t in tensors)}


def _gmacs(model: MultiTaskModel, image: Tensor, tasks: Sequence[str]) -> float:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return count_macs(lambda: model(image, tasks=tuple(tasks))).forward / 1e9
    finally:
        model.train(was_training)


def as_text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    before, after = report["before"], report["after"]
    kept = [
        f"block {block}: {len(ids)} experts ({' '.join(map(str, ids))})" for block, ids in report["experts"].items()
    ]
    rows = [
        ("parameters", f"{before['num_params']:,}", f"{after['num_params']:,}"),
        ("weights, MB", f"{before['bytes'] / 2**20:.1f}", f"{after['bytes'] / 2**20:.1f}"),
        ("all tasks, GMACs an image", f"{before['gmacs_all_tasks']:.3f}", "-"),
        (f"{report['task']} alone, GMACs", f"{before['gmacs']:.3f}", f"{after['gmacs']:.3f}"),
    ]
    width = max(len(name) for name, *_ in rows)
    lines = [*kept, f"{'':<{width}}  {'before':>12}  {'after':>12}"]
    lines += [f"{name:<{width}}  {then:>12}  {now:>12}" for name, then, now in rows]
    metrics = {"before": before["metrics"], "after": after["metrics"]}
    return "\n".join([*lines, f"{report['num_images']} images", metrics_table(metrics, report["protocol"])])
