"""Single-task baselines of delta_m: runs of this toolkit that trained one task each. Nothing is taken from papers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from m3bsr.report.rows import comparison_row, qualities
from m3bsr.report.run import read_json
from m3bsr.report.spread import Spread

# Numbers scored otherwise are not comparable; a run with another budget is, but the table has to say so.
SCORING = ("data.name", "data.sets", "data.val_split", "data.image_size", "data.max_val")
BUDGET = (
    *("data.train_split", "data.max_train", "data.augment"),
    *("train.epochs", "train.max_steps", "train.batch_size", "train.accumulate"),
)


@dataclass(frozen=True)
class BaselineRun:
    """One seed of a baseline."""

    folder: str
    seed: int | None
    value: float
    protocol: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Baseline:
    """A task trained alone: the column it stands for (``semseg miou``) and its runs."""

    task: str
    column: str
    runs: tuple[BaselineRun, ...]

    @property
    def score(self) -> Spread:
        """Mean over seeds."""
        return Spread.of([run.value for run in self.runs])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the scores with folder, seed and config behind each."""
        score = self.score
        return {"task": self.task, "mean": float(score), "std": score.spread, "runs": [asdict(r) for r in self.runs]}


def read_baselines(groups: Mapping[str, Sequence[Path]]) -> dict[str, Baseline]:
    """The baselines by column; a group holds the seeds of one task.

    Raises:
        ValueError: a run of several tasks, without a score, or two groups for one task.
    """
    found: dict[str, Baseline] = {}
    for folders in groups.values():
        runs, tasks, column = [], [], ""
        for folder in folders:
            config, result = read_json(folder / "config.json"), read_json(folder / "result.json")
            tasks = list(config.get("data", {}).get("tasks", ()))
            if len(tasks) != 1:
                raise ValueError(
                    f"{folder} is no baseline: it trained {len(tasks)} tasks ({', '.join(tasks)}), not one"
                )
            row = comparison_row(folder)
            column = next(iter(qualities([row])), "")
            if row.get(column) is None:
                raise ValueError(f"{folder} is no baseline: its result.json has no score of {tasks[0]}")
            seed = config.get("run", {}).get("seed")
            runs.append(BaselineRun(str(folder), seed, row[column], result.get("protocol", ""), config))
        if column in found:
            raise ValueError(f"two baselines for {tasks[0]}: {found[column].runs[0].folder} and {folders[0]}")
        found[column] = Baseline(tasks[0], column, tuple(runs))
    return found


def scores_of(baselines: Mapping[str, Baseline] | None, columns: Iterable[str]) -> dict[str, float] | None:
    """The score that each column of a table is compared with; None without baselines.

    Raises:
        ValueError: a column has none, or one of zero.
    """
    if not baselines:
        return None
    for column in columns:
        task = column.partition(" ")[0]
        if column not in baselines:
            known = ", ".join(base.task for base in baselines.values())
            raise ValueError(
                f"no baseline for {task}: a run that trained it alone is missing (there are some for {known})"
            )
        if not baselines[column].score:
            raise ValueError(f"the baseline of {task} is 0, so a relative gain has no meaning")
    return {column: float(base.score) for column, base in baselines.items()}


def check_baselines(baselines: Mapping[str, Baseline], runs: Iterable[Path]) -> list[str]:
    """Whether ``runs`` can be compared with ``baselines``; a sentence for each pair that had another budget.

    Raises:
        ValueError: a pair was scored otherwise: other data, size, or protocol.
    """
    bases = [base for baseline in baselines.values() for base in baseline.runs]
    differing = []
    for folder in runs if bases else ():
        config, protocol = read_json(folder / "config.json"), read_json(folder / "result.json").get("protocol", "")
        for base in bases:
            fields = {name: (_field(config, name), _field(base.config, name)) for name in (*SCORING, *BUDGET)}
            fields["protocol"] = (protocol, base.protocol)
            for name, (here, there) in fields.items():
                if here == there:
                    continue
                pair = f"{folder} and its baseline {base.folder}"
                values = f"{name} is {here!r} and {there!r}"
                if name not in BUDGET:
                    raise ValueError(f"{pair} were scored otherwise: {values}")
                differing.append(f"Not the same budget, {pair}: {values}.")
    return differing


def baselines_note(baselines: Mapping[str, Baseline]) -> str:
    """What delta_m is against, for the page."""
    said = [f"{b.task} {float(b.score):.4g} ({_seeds(b)})" for b in baselines.values()]
    return f"delta_m is against the same tasks trained alone: {', '.join(said)}."


def _seeds(baseline: Baseline) -> str:
    seeds = [str(run.seed) for run in baseline.runs]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _field(config: Mapping[str, Any], name: str) -> Any:
    section, _, key = name.partition(".")
    return config.get(section, {}).get(key)
