"""The command show_tokens on timm models and on a run, at tiny size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from m3bsr.build import build_model
from m3bsr.cli import show_tokens
from m3bsr.config import Config, Plan, replace
from m3bsr.engine import save_checkpoint
from m3bsr.models import MultiTaskModel

RUN = {
    "data.tasks": ("semseg", "depth"),
    "data.image_size": (48, 64),
    "model.backbone": "m3vit_tiny_patch16",
    "model.head_dim": 8,
    "moe.blocks": (1,),
    "moe.num_experts": 4,
    "moe.top_k": 2,
    "bsr.train_blocks": (11,),
    "bsr.drop_blocks": (3, 5),
    "bsr.keep_rate": 0.5,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of DeiT-tiny at 224, for models of any size."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), path)
    return path


def write_photo(path: Path, size: tuple[int, int] = (70, 50), seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make(**changes) -> tuple[Config, MultiTaskModel]:
    torch.manual_seed(0)
    config = replace(Config(), {**RUN, **changes})
    model = build_model(config).eval()
    for gate in model.backbone.blocks[1].mlp.gates.values() if config.moe.blocks else ():
        torch.nn.init.normal_(gate.w_gate)  # tasks that route apart, and so drop apart
    return config, model


def write_run(folder: Path, **changes) -> Path:
    config, model = make(**changes)
    last = folder / "checkpoints" / "last"
    save_checkpoint(last, model=model, config=config.to_dict(), progress={"step": 1})
    return folder


def test_photos_under_a_plan(weights, tmp_path, capsys) -> None:
    photos = [write_photo(tmp_path / "a.jpg"), write_photo(tmp_path / "b.png", (30, 90), seed=1)]
    out = tmp_path / "pictures" / "tokens.png"
    arguments = [*map(str, photos), "--weights", str(weights), "--size", "64", "--out", str(out)]
    assert (
        show_tokens.main([*arguments, "--drop-blocks", "2", "5", "--fuse", "mean", "--keep-rate", "0.5", "0.25"]) == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "block 2: 10 tokens, 8 of 16 patches kept, 1 fused tokens, 0 patches lost",
        "block 5: 5 tokens, 2 of 16 patches kept, 2 fused tokens, 0 patches lost",
        str(out),
    ]
    with Image.open(out) as image:
        assert image.width > 3 * 200 and image.height > 2 * 200


def test_merged_patches_are_counted_as_such(weights, tmp_path, capsys) -> None:
    photo, out = write_photo(tmp_path / "a.jpg"), tmp_path / "tokens.png"
    arguments = [str(photo), "--weights", str(weights), "--size", "64", "--out", str(out), "--drop-blocks", "2", "5"]
    assert show_tokens.main([*arguments, "--fuse", "merge", "--select", "similar"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "block 2: 9 tokens, 8 of 16 patches kept, 0 fused tokens, 8 patches merged, 0 patches lost",
        "block 5: 5 tokens, 4 of 16 patches kept, 0 fused tokens, 12 patches merged, 0 patches lost",
    ]


def test_a_run_that_drops_from_the_backward_pass_only_has_nothing_to_show(tmp_path, capsys) -> None:
    run = write_run(tmp_path / "run", **{"bsr": Plan((2,), drop_blocks=(1,), keep_rate=0.5, drop_from="backward")})
    assert show_tokens.main([str(write_photo(tmp_path / "a.jpg")), "--run", str(run)]) == 2
    assert "leave the backward pass only" in capsys.readouterr().err


def test_the_default_plan_and_the_frozen_scores(weights, tmp_path, capsys) -> None:
    photo = write_photo(tmp_path / "a.jpg")
    arguments = [str(photo), "--weights", str(weights), "--size", "48", "64", "--out", str(tmp_path / "t.svg")]
    assert show_tokens.main(arguments) == 0
    blocks = [line.split(" tokens")[0] for line in capsys.readouterr().out.splitlines()[:3]]
    assert blocks == ["block 3: 8", "block 6: 6", "block 9: 5"]
    assert (tmp_path / "t.svg").read_text().startswith("<?xml")
    assert (
        show_tokens.main([*arguments, "--score-source", "frozen", "--train-blocks", "0", "3", "--drop-blocks", "0"])
        == 2
    )
    assert "score_source" in capsys.readouterr().err


def test_tasks_that_drop_apart_have_rows_of_their_own(tmp_path) -> None:
    photo = write_photo(tmp_path / "a.jpg")
    config, model = make()
    rows = list(show_tokens.show(model.backbone, config, photo))
    assert [row.name for row in rows] == ["a.jpg: semseg", "a.jpg: depth"]
    assert rows[0].photo.shape == (48, 64, 3) and rows[0].grid == (3, 4)
    assert [(s.block, s.num_tokens) for s in rows[1].steps] == [(3, 8), (5, 6)]
    config, model = make(**{"moe.blocks": ()})
    assert [row.name for row in show_tokens.show(model.backbone, config, photo)] == ["a.jpg"]


def test_a_run_brings_its_model_and_its_plan(tmp_path, capsys) -> None:
    run, photo = write_run(tmp_path / "run", **{"bsr.drop_blocks": (4,)}), write_photo(tmp_path / "a.jpg")
    assert show_tokens.main([str(photo), "--run", str(run), "--out", str(tmp_path / "t.png")]) == 0
    assert capsys.readouterr().out.startswith("block 4: 8 tokens, 6 of 12 patches kept, 1 fused")
    assert (tmp_path / "t.png").is_file()


def test_the_plan_of_the_method_counts_not_that_of_the_config(tmp_path, capsys) -> None:
    photo = write_photo(tmp_path / "a.jpg")
    plan = {"bsr.drop_blocks": (4,), "bsr.keep_rate": 0.5}
    dropping = write_run(tmp_path / "drop", **plan, **{"model.method": "token_drop:.25"})
    assert show_tokens.main([str(photo), "--run", str(dropping), "--out", str(tmp_path / "t.png")]) == 0
    assert capsys.readouterr().out.startswith("block 4: 5 tokens, 3 of 12 patches kept")
    full = write_run(tmp_path / "full", **plan, **{"model.method": "full"})
    assert show_tokens.main([str(photo), "--run", str(full)]) == 2
    assert "(method full) names no block that drops tokens" in capsys.readouterr().err
    evit = write_run(tmp_path / "evit", **{"bsr.drop_blocks": (), "model.method": "token_drop"})
    assert show_tokens.main([str(photo), "--run", str(evit), "--out", str(tmp_path / "e.png")]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:3]] == [
        "block 3",
        "block 6",
        "block 9",
    ]


FAULTS = {
    "missing": (["nowhere.jpg"], "missing file: nowhere.jpg"),
    "weights": (["PHOTO", "--weights", "nowhere.pth"], "no such file: nowhere.pth"),
    "model": (["PHOTO", "--model", "deit_tny_patch16_224"], "did you mean 'deit_tiny_patch16_224'"),
    "last block": (["PHOTO", "--drop-blocks", "11"], "last block"),
    "no block": (["PHOTO", "--drop-blocks"], "nothing to show"),
    "rate": (["PHOTO", "--keep-rate", "1.5"], "keep_rate"),
    "size": (["PHOTO", "--size", "50"], "multiples of the patch size"),
    "sizes": (["PHOTO", "--size", "32", "32", "3"], "--size takes"),
    "format": (["PHOTO", "--out", "tokens.gif"], ".png, .jpg, .pdf, .svg"),
    "run": (["PHOTO", "--run", "nowhere"], "no such run folder: nowhere"),
    "both": (["PHOTO", "--run", "nowhere", "--fuse", "sum", "--size", "32"], "leave out --fuse, --size"),
    "text": (["TEXT", "--size", "32"], "TEXT"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line(weights, tmp_path, monkeypatch, capsys, fault: str) -> None:
    monkeypatch.chdir(tmp_path)
    write_photo(tmp_path / "photo.jpg").rename("PHOTO")
    Path("TEXT").write_text("no picture at all")
    arguments, message = FAULTS[fault]
    if not {"--weights", "--run"} & set(arguments):
        arguments = [*arguments, "--weights", str(weights)]
    assert show_tokens.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("tokens.*"))


def test_a_run_that_drops_nothing_has_nothing_to_show(tmp_path, capsys) -> None:
    run, photo = write_run(tmp_path / "run", **{"bsr.drop_blocks": ()}), write_photo(tmp_path / "a.jpg")
    assert show_tokens.main([str(photo), "--run", str(run)]) == 2
    assert f"{run} names no block" in capsys.readouterr().err
