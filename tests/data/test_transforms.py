"""Joint transforms against geometry: a transformed picture's labels equal those of a picture rendered that way."""

from __future__ import annotations

import pickle
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor
from torchvision import tv_tensors

from m3bsr.data import NYUD, RECIPES, build_transform
from m3bsr.data.transforms import (
    Depth,
    Edge,
    Labels,
    Normals,
    RandomScaleCrop,
    RandomZoom,
    flip,
    pad_to,
    resize,
    scale_rotate,
)
from m3bsr.engine.loader import train_loader
from m3bsr.utils.constants import IGNORE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "datasets" / "scenes"))
from scene_rooms import render_scene  # noqa: E402

TASKS = ("semseg", "depth", "normals", "edge")


def _sample(view: dict) -> dict[str, Tensor]:
    """A rendered view as the loader would give it to a transform."""
    labels = torch.from_numpy(view["segmentation"].astype("int64"))[None]
    return {
        "image": tv_tensors.Image(torch.from_numpy(view["image"].copy()).permute(2, 0, 1)),
        "semseg": Labels(torch.where(labels == 0, IGNORE, labels - 1).to(torch.uint8)),
        "depth": Depth(torch.from_numpy(view["depth"].copy())[None]),
        "normals": Normals(torch.from_numpy(view["normals"].copy()).permute(2, 0, 1)),
        "edge": Edge(torch.from_numpy(view["edge"].copy())[None].float()),
    }


def _room(height: int = 120, width: int = 160, **camera) -> dict[str, Tensor]:
    return _sample(render_scene(0, "source", 3, height, width, **camera))


def _coded(height: int, width: int, border: float = 0.2) -> dict[str, Tensor]:
    """Every target tells where its pixel came from; a band at the top is invalid. Normals are unit vectors."""
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    hole = v < border * height
    angle = 0.01 * (u + 3 * v)
    normals = torch.stack([0.6 * angle.cos(), 0.6 * angle.sin(), torch.full_like(angle, -0.8)])
    return {
        "image": tv_tensors.Image(torch.stack([u % 256, v % 256, (u + v) % 256]).to(torch.uint8)),
        "semseg": Labels(torch.where(hole, IGNORE, (u // 7 + v // 5) % 40)[None].to(torch.uint8)),
        "depth": Depth(torch.where(hole, float(IGNORE), 1 + u / width + v / height)[None]),
        "normals": Normals(torch.where(hole, float(IGNORE), normals)),
        "edge": Edge(torch.where(hole, float(IGNORE), ((u + v) % 9 == 0).float())[None]),
    }


def _valid(target: Tensor) -> Tensor:
    return (target != IGNORE).all(dim=0)


def _angle(one: Tensor, two: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos((one * two).sum(dim=0).clamp(-1, 1)))


def test_a_flipped_room_is_the_room_in_a_mirror():
    flipped, mirrored = flip(_room()), _room(mirrored=True)
    assert (flipped["image"].float() - mirrored["image"].float()).abs().mean() < 0.5
    for task in TASKS:
        same = (flipped[task] - mirrored[task]).abs().amax(dim=0) < 1e-3
        assert same.float().mean() > 0.995, task
        assert type(flipped[task]) is type(mirrored[task])
    assert (flipped["normals"][0] + _room()["normals"][0].flip(-1)).abs().max() == 0


@pytest.mark.parametrize("angle", [20.0, -13.0, 90.0])
def test_a_turned_room_is_the_room_seen_by_a_turned_camera(angle):
    plain = _room(160, 160)
    # A camera that turns clockwise sees the room turn counter-clockwise.
    turned, rolled = scale_rotate(plain, 1.0, angle), _room(160, 160, roll=angle)
    inside = _valid(turned["semseg"]) & _valid(rolled["semseg"])
    assert inside.float().mean() > 0.8
    assert (turned["semseg"] == rolled["semseg"])[0][inside].float().mean() > 0.95
    assert _angle(turned["normals"], rolled["normals"])[inside].quantile(0.9) < 1
    assert (turned["depth"] / rolled["depth"] - 1).abs()[0][inside].quantile(0.9) < 0.03
    assert torch.equal(_valid(turned["normals"]), _valid(turned["depth"]))


@pytest.mark.parametrize("factor", [1.4, 0.8])
def test_a_zoomed_room_is_seen_with_a_longer_lens_and_looks_nearer_by_the_factor(factor):
    zoomed, rendered = scale_rotate(_room(), factor, 0.0), _room(zoom=factor)
    inside = _valid(zoomed["semseg"]) & _valid(rendered["semseg"])
    assert (zoomed["semseg"] == rendered["semseg"])[0][inside].float().mean() > 0.95
    assert _angle(zoomed["normals"], rendered["normals"])[inside].quantile(0.9) < 1
    assert (zoomed["depth"] * factor / rendered["depth"] - 1).abs()[0][inside].quantile(0.9) < 0.03


def test_random_zoom_divides_depth_by_what_the_camera_did_and_resize_does_not():
    plane = {k: v for k, v in _room().items() if k in ("image", "depth")}
    plane["depth"] = Depth(torch.full((1, 120, 160), 3.0))
    torch.manual_seed(0)
    zoomed = RandomZoom((60, 80), (2.0, 2.0))(plane)["depth"]
    assert zoomed.shape == (1, 60, 80) and zoomed.unique().tolist() == [1.5]
    assert resize(plane, (60, 80))["depth"].unique().tolist() == [3.0]


@settings(max_examples=40)
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    target=st.tuples(st.integers(16, 60), st.integers(16, 60)),
)
def test_no_recipe_mixes_labels_or_leaks_invalid_pixels(recipe, seed, size, target):
    torch.manual_seed(seed)
    before = _coded(*size)
    after = build_transform(recipe, target, train=True)(dict(before))
    assert after["image"].shape == (3, *target) and after["image"].dtype == torch.float32
    assert after["image"].isfinite().all()
    for task, channels in zip(TASKS, (1, 1, 3, 1), strict=True):
        assert after[task].shape == (channels, *target) and after[task].dtype == before[task].dtype
        # The invalid band and the borders cover the same pixels in every task: nothing was blended.
        assert torch.equal(_valid(after[task]), _valid(after["semseg"])), task
    valid = _valid(after["semseg"])
    assert set(after["semseg"][0][valid].tolist()) <= set(before["semseg"].unique().tolist())
    assert set(after["edge"][0][valid].tolist()) <= {0.0, 1.0}
    if valid.any():
        normals = after["normals"][:, valid]
        assert torch.allclose(normals.norm(dim=0), torch.ones(normals.shape[1]), atol=1e-5)
        assert torch.allclose(normals[2], torch.tensor(-0.8))
        depth = after["depth"][0][valid]
        assert depth.min() >= 1 / 2.1 and depth.max() <= 3 / 0.49  # zooms from .5 to 2, and rounding


@pytest.mark.parametrize(
    ("step", "zoom"),
    [
        (flip, 1.0),
        (partial(resize, size=(30, 50)), 1.0),
        (partial(scale_rotate, factor=1.25, angle=15.0), 1.25),
        (RandomZoom((60, 100), (1.25, 1.25)), 1.25),
        (RandomScaleCrop((50, 80), (1.25, 1.25)), 1.25),
    ],
)
def test_image_and_labels_move_together(step, zoom):
    torch.manual_seed(1)
    sample = _coded(60, 100, border=0)
    sample["depth"] = Depth(sample["image"][:1].float() + 1)  # the column plus one, and so is the red channel
    moved = step(sample)
    valid = _valid(moved["depth"])
    columns = moved["depth"][0] * zoom - 1
    error = (columns - moved["image"][0].float()).abs()[valid]
    assert valid.float().mean() > 0.9 and error.quantile(0.95) <= 1.6


def test_labels_do_not_shift_against_the_image_when_the_size_shrinks():
    sample = _coded(80, 120, border=0)
    sample["depth"] = Depth(sample["image"][:1].float())
    small = resize(sample, (20, 30))
    shift = (small["depth"][0] - small["image"][0].float()).mean()
    assert abs(shift) < 0.75  # plain nearest takes the first of four columns: 1.5 off
    assert type(small["depth"]) is Depth


def test_borders_are_the_mean_colour_and_ignored():
    black = {k: v for k, v in _coded(20, 30).items() if k != "image"} | {
        "image": tv_tensors.Image(torch.zeros(3, 20, 30).byte())
    }
    padded = pad_to(black, (24, 40))
    mean = [round(c * 255) for c in IMAGENET_DEFAULT_MEAN]
    assert padded["image"].shape == (3, 24, 40) and padded["image"][:, -1, -1].tolist() == mean
    assert all((padded[task][:, 20:] == IGNORE).all() and (padded[task][:, :, 30:] == IGNORE).all() for task in TASKS)
    shrunk = scale_rotate(black, 0.5, 0.0)
    assert shrunk["image"][:, 0, 0].tolist() == pytest.approx(mean, abs=1)
    assert all((shrunk[task][:, 0] == IGNORE).all() for task in TASKS)


def test_a_crop_avoids_one_class_filling_it():
    labels = torch.zeros(1, 60, 200, dtype=torch.uint8)
    labels[..., 150:] = torch.arange(50) % 5 + 1
    sample = {"image": tv_tensors.Image(torch.zeros(3, 60, 200).byte()), "semseg": Labels(labels)}
    torch.manual_seed(0)
    # A crop of a quarter of the picture at twice the scale: no resampling, only the choice of the place.
    careful, careless = RandomScaleCrop((60, 50), (2.0, 2.0)), RandomScaleCrop((60, 50), (2.0, 2.0), 1.0)
    shares = [(careful(sample)["semseg"] == 0).float().mean().item() for _ in range(40)]
    anywhere = [(careless(sample)["semseg"] == 0).float().mean().item() for _ in range(40)]
    assert sum(share > 0.75 for share in shares) < 15 < sum(share > 0.75 for share in anywhere)


def test_validation_never_augments_and_an_unknown_recipe_is_named():
    sample = _room()
    one, two = (build_transform(recipe, (60, 80), train=False)(dict(sample)) for recipe in ("astmt", "atrc"))
    assert all(torch.equal(one[key], two[key]) for key in sample)
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
    same = build_transform("none", (120, 160), train=False, std=(1, 1, 1))(dict(sample))
    assert torch.allclose(same["image"].as_subclass(Tensor) + mean, sample["image"] / 255, atol=1e-6)
    assert torch.equal(same["depth"], sample["depth"])
    with pytest.raises(ValueError, match="unknown data.augment 'astm'.*did you mean 'astmt'"):
        build_transform("astm", (60, 80), train=True)


def _magnification(sample: dict[str, Tensor]) -> float:
    """Output pixels per input pixel along a line, from the coordinates that two masks carry."""
    inside = sample["column"][0] != IGNORE
    v, u = inside.nonzero().T.double()
    system = torch.stack([u, v, torch.ones_like(u)], dim=1)
    source = torch.stack([sample[key][0][inside] for key in ("column", "row")], dim=1).double()
    jacobian = torch.linalg.lstsq(system, source).solution[:2]
    return float(torch.linalg.det(jacobian).abs() ** -0.5)


@pytest.mark.parametrize("size", [(48, 64), (96, 128), (192, 256), (128, 128)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_depth_is_divided_by_the_scale_that_validation_does_not_have(recipe, size):
    """One apparent size, one depth: whatever the files' resolution, training and validation agree."""
    row, column = torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij")
    sample = {
        "image": tv_tensors.Image(torch.zeros(3, 96, 128).byte()),
        "depth": Depth(torch.full((1, 96, 128), 3.0)),
        "row": Edge(row[None]),
        "column": Edge(column[None]),
    }
    plain = _magnification(build_transform("none", size, train=False)(dict(sample)))
    transform = build_transform(recipe, size, train=True)
    for seed in range(6):
        torch.manual_seed(seed)
        moved = transform(dict(sample))
        expected = 3.0 * plain / _magnification(moved)
        assert float(moved["depth"][moved["depth"] != IGNORE].mean()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_pickled_recipe_does_the_same(recipe):
    """Workers that are spawned, not forked, receive their transform in a pickle."""
    transform, sample = build_transform(recipe, (60, 80), train=True), _room()
    copied = pickle.loads(pickle.dumps(transform))
    results = []
    for one in (transform, copied):
        torch.manual_seed(2)
        results.append(one(dict(sample)))
    assert all(torch.equal(results[0][key], results[1][key]) for key in sample)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "none"])
def test_torch_seed_alone_decides_a_sample(recipe):
    transform, sample = build_transform(recipe, (60, 80), train=True), _room()
    results = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        results.append(transform(dict(sample)))
    assert all(torch.equal(results[0][key], results[1][key]) for key in sample)
    assert not torch.equal(results[0]["image"], results[2]["image"])


def test_workers_and_a_resumed_run_see_the_same_pixels(root):
    dataset = NYUD(root, "train", ("semseg", "depth"), transform=build_transform("astmt", (16, 32), train=True))

    def batches(num_workers: int, start: int) -> list[dict]:
        loader = train_loader(dataset, batch_size=1, start_step=start, stop_step=6, seed=3, num_workers=num_workers)
        return list(loader)

    here, workers, resumed = batches(0, 0), batches(2, 0), batches(0, 4)
    assert {name for batch in here[:3] for name in batch["name"]} == {"a", "b", "c"}
    for one, two in [*zip(here, workers, strict=True), *zip(here[4:], resumed, strict=True)]:
        assert one["name"] == two["name"]
        assert all(torch.equal(one[key], two[key]) for key in ("image", "semseg", "depth"))
    first_epoch, second_epoch = ({b["name"][0]: b["image"] for b in part} for part in (here[:3], here[3:]))
    assert not all(torch.equal(first_epoch[name], second_epoch[name]) for name in first_epoch)
