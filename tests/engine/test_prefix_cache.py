"""Kept prefixes: files that may be missing, damaged or too many, and the hash that keeps stale ones out."""

from __future__ import annotations

import copy
import errno

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from m3bsr.backbones import task_backbone
from m3bsr.bsr import Plan, state_tensors
from m3bsr.engine import prefix_cache
from m3bsr.engine.loader import ShuffledBatches, train_loader
from m3bsr.engine.prefix_cache import PrefixCache, PrefixFiles
from m3bsr.heads import HEADS
from m3bsr.models import MultiTaskModel

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=0)
    backbone = task_backbone(vit, ("depth",))
    backbone.set_plan(Plan(train_blocks=(3,), drop_blocks=(1,), keep_rate=0.5, restore="transfer"))
    return MultiTaskModel(backbone, {"depth": HEADS["light"](24, 1, head_dim=8)}).train()


def cache(root, **key):
    return PrefixCache(root, {"batch_size": 2, **key}, (32, 32), num_files=6)


def batch(files, indices=(0, 1), seeds=(7, 8)):
    return {"index": list(indices), "seed": list(seeds), "prefix": files.read_batch(indices, seeds)}


def same(a, b):
    a, b = state_tensors(a.state), state_tensors(b.state)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_written_once_then_read(model, tmp_path, capsys):
    kept = cache(tmp_path)
    files = kept.open(model, CPU, "fp32")
    line = capsys.readouterr().err
    assert "blocks 0 to 2 (block 3 trains)" in line and "0 of 6 views" in line and "MB to come" in line
    images = torch.randn(2, 3, 32, 32)
    computed = kept.prefix(images, batch(files))
    found = batch(files)
    assert found["prefix"] is not None and "stages.0.x_drop_BRD" in found["prefix"]
    assert same(computed, kept.prefix(torch.zeros_like(images), found))  # the pictures are not looked at any more
    assert computed.num_blocks == 3
    cache(tmp_path).open(model, CPU, "fp32")
    assert "2 of 6 views" in capsys.readouterr().err
    turned = kept.prefix(images, batch(files, (1, 0), (8, 7)))
    assert torch.equal(turned.state.x_BND, computed.state.x_BND[[1, 0]])


def test_a_batch_with_one_file_missing_or_damaged_is_computed_and_mended(model, tmp_path, caplog):
    kept = cache(tmp_path)
    files = kept.open(model, CPU, "fp32")
    images = torch.randn(2, 3, 32, 32)
    computed = kept.prefix(images, batch(files))
    for damage in (lambda p: p.write_bytes(p.read_bytes()[:-5]), lambda p: p.write_bytes(b""), lambda p: p.unlink()):
        damage(files.path(1, 8))
        found = batch(files)
        assert found["prefix"] is None
        assert same(computed, kept.prefix(images, found)) and batch(files)["prefix"] is not None
    assert caplog.text.count("cannot be read") == 2
    other = PrefixFiles(files.folder, {**files.shapes, "scores_BM": ((3,), torch.float32)})
    assert other.read(0, 7) is None and "other tensors" in caplog.text


@pytest.mark.parametrize("what", ["weights", "plan", "image size", "precision", "transforms", "batch size"])
def test_whatever_the_tokens_depend_on_is_in_the_hash(model, tmp_path, what):
    first = cache(tmp_path, transform="flip").open(model, CPU, "fp32").folder
    assert cache(tmp_path, transform="flip").open(copy.deepcopy(model), CPU, "fp32").folder == first
    changed, precision = cache(tmp_path, transform="flip"), "fp32"
    if what == "weights":
        with torch.no_grad():
            model.backbone.blocks[2].mlp.fc2.bias[0] += 1e-6
    elif what == "plan":
        model.backbone.set_plan(Plan(train_blocks=(3,), drop_blocks=(1,), keep_rate=0.6, restore="transfer"))
    elif what == "image size":
        model.backbone.set_input_size((64, 32))
        changed = PrefixCache(tmp_path, changed.key, (64, 32), 6)
    elif what == "precision":
        precision = "bf16"
    else:
        changed = cache(tmp_path, **({"transform": "crop"} if what == "transforms" else {"batch_size": 3}))
    assert changed.open(model, CPU, precision).folder != first


def test_weights_behind_the_prefix_do_not_matter(model, tmp_path):
    first = cache(tmp_path).open(model, CPU, "fp32").folder
    with torch.no_grad():
        model.backbone.blocks[3].mlp.fc2.bias += 1
    assert cache(tmp_path).open(model, CPU, "fp32").folder == first


def test_a_full_disk_is_a_line_and_no_more_writing(model, tmp_path, monkeypatch, capsys):
    kept = cache(tmp_path)
    files = kept.open(model, CPU, "fp32")
    tries = []

    def full(tensors, path):
        tries.append(path)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prefix_cache, "save_file", full)
    images = torch.randn(2, 3, 32, 32)
    expected = model.forward_prefix(images, 3)
    for _ in range(2):
        assert same(expected, kept.prefix(images, batch(files)))
    assert len(tries) == 1 and not list(files.folder.iterdir())
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_an_estimate_beyond_the_disk_is_said_at_once(model, tmp_path, capsys):
    PrefixCache(tmp_path, {}, (32, 32), num_files=10**12).open(model, CPU, "fp32")
    assert "will be full before" in capsys.readouterr().err


def test_nothing_frozen_is_a_user_error(model, tmp_path):
    model.backbone.set_plan(Plan())
    with pytest.raises(ValueError, match=r"bsr.cache_prefix: there is nothing to keep: the patch embedding trains"):
        cache(tmp_path).open(model, CPU, "fp32")


def reading(blocks):
    """A model of six blocks, the last one trained, whose head reads ``blocks``."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3, num_classes=0)
    backbone = task_backbone(vit, ("depth",))
    backbone.set_plan(Plan(train_blocks=(5,), drop_blocks=(1,), keep_rate=0.5, restore="transfer"))
    return MultiTaskModel(backbone, {"depth": HEADS["multilevel"](24, 1, head_dim=8, blocks=blocks)}).train()


def test_the_prefix_ends_before_the_first_block_that_a_head_reads(tmp_path, capsys):
    model, kept = reading((2, 3, 4, 5)), cache(tmp_path)
    files = kept.open(model, CPU, "fp32")
    assert "blocks 0 to 1 (a head reads block 2)" in capsys.readouterr().err
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        prefix = kept.prefix(images, batch(files))
        found, expected = model(images, prefix=prefix), model(images)
    assert prefix.num_blocks == 2 and torch.equal(found.predictions["depth"], expected.predictions["depth"])
    with pytest.raises(ValueError, match="there is nothing to keep: a head reads block 0"):
        cache(tmp_path).open(reading((0, 3, 4, 5)), CPU, "fp32")


def keys(num_views, start=0):
    batches = ShuffledBatches(6, 2, batches_per_epoch=3, seed=5, start=start, stop=12, num_views=num_views)
    return list(batches)


def test_views_take_turns_and_do_not_hang_on_the_order():
    epochs = [dict(sum(keys(2)[i : i + 3], [])) for i in range(0, 12, 3)]
    assert epochs[0] == epochs[2] and epochs[1] == epochs[3]
    assert all(epochs[0][index] != epochs[1][index] for index in range(6))
    assert keys(2)[5:] == keys(2, start=5)
    assert len({seed for epoch in keys(None) for _, seed in epoch}) == 24


def test_the_loader_finds_what_was_written(tiny, tmp_path):
    files = PrefixFiles(tmp_path, {"x_BND": ((2,), torch.float32)})
    how = {"batch_size": 2, "start_step": 0, "stop_step": 6, "seed": 1, "num_views": 1, "prefixes": files}
    first = next(iter(train_loader(tiny.TinySet(4), **how)))
    assert first["prefix"] is None
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    files.write_batch({"x_BND": tokens}, first["index"], first["seed"])
    again = next(iter(train_loader(tiny.TinySet(4), **how, num_workers=1)))
    assert torch.equal(again["prefix"]["x_BND"], tokens) and again["index"] == first["index"]
