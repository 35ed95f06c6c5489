"""The small Cityscapes: arrays become targets, and a zoom multiplies inverse depth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from m3bsr.data.cityscapes import Cityscapes
from m3bsr.data.transforms import Depth, InverseDepth, resize, scale_rotate
from m3bsr.utils.constants import IGNORE

H, W = 16, 32


@pytest.fixture
def root(tmp_path):
    """Eleven training and two validation samples."""
    rng = np.random.default_rng(0)
    for split, num in (("train", 11), ("val", 2)):
        for folder in ("image", "label_7", "depth"):
            (tmp_path / split / folder).mkdir(parents=True)
        for i in range(num):
            np.save(tmp_path / split / "image" / f"{i}.npy", np.full((H, W, 3), i / 255))
            labels = rng.integers(-1, 7, (H, W)).astype(np.float64)
            labels[0, :3] = -1, 0, 6
            np.save(tmp_path / split / "label_7" / f"{i}.npy", labels)
            depth = rng.uniform(0.01, 0.3, (H, W, 1))
            depth[0, 0] = 0
            np.save(tmp_path / split / "depth" / f"{i}.npy", depth)
    return tmp_path


def test_arrays_become_targets_in_the_order_of_their_numbers(root):
    dataset = Cityscapes(root, "train", ("semseg", "depth"))
    assert dataset.names == [str(i) for i in range(11)]
    sample = dataset[10]
    assert sample["image"].dtype == torch.uint8 and (sample["image"] == 10).all()
    assert sample["semseg"].dtype == torch.int64 and sample["semseg"][0, 0, :3].tolist() == [IGNORE, 0, 6]
    assert sample["depth"].shape == (1, H, W) and sample["depth"][0, 0, 0] == IGNORE
    assert sample["depth"][sample["depth"] != IGNORE].min() >= 0.01 and sample["depth"][0, 1].max() < 0.31
    assert Cityscapes.tasks_in(root) == ("semseg", "depth")
    assert len(Cityscapes(root, "val", ("depth",), max_samples=1)) == 1


def test_a_zoom_multiplies_inverse_depth_and_divides_depth():
    metres = torch.rand(1, 8, 12) * 5 + 1
    metres[0, 0, 0] = IGNORE
    inverse = torch.where(metres == IGNORE, metres, 1 / metres)
    for zoom in (
        lambda sample: scale_rotate(sample, 1.3, 10.0),
        lambda sample: resize(sample, (16, 20), zoom=1.7),
    ):
        moved = zoom({"depth": Depth(metres), "inverse": InverseDepth(inverse), "image": InverseDepth(inverse)})
        depth, other = (moved[key].as_subclass(torch.Tensor) for key in ("depth", "inverse"))
        assert isinstance(moved["inverse"], InverseDepth) and isinstance(moved["depth"], Depth)
        valid = depth != IGNORE
        assert valid.any() and torch.equal(valid, other != IGNORE)
        torch.testing.assert_close(other[valid], 1 / depth[valid])


def _array(folder: str, values):
    return lambda root: np.save(root / "train" / folder / "0.npy", values)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_array("image", np.full((H, W, 3), -0.5)), "image/0.npy: values from 0 to 1 are expected"),
        (_array("image", np.full((H, W, 3), np.nan)), "image/0.npy: values from 0 to 1 are expected"),
        (_array("label_7", np.full((H, W), 7)), "label_7/0.npy: label 7 is out of range; known: -1-6, 255"),
        (_array("depth", np.full((H, W), 40.0)), "depth/0.npy: depth 40 is out of range, inverse depths up to 10"),
        (_array("depth", np.full((H, W - 1), 0.1)), "depth/0.npy is 16x31 pixels, its image .*image/0.npy 16x32"),
        (lambda root: (root / "train" / "depth" / "0.npy").unlink(), "missing file: .*depth/0.npy, listed in .*image"),
        (lambda root: (root / "train").rename(root / "training"), r"train has no folder image \(splits there: traini"),
        (lambda root: (root / "train" / "depth").rename(root / "x"), "has no folder depth, needed for task depth"),
    ],
)
def test_faults_are_named(root, spoil, message):
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        Cityscapes(root, "train", ("semseg", "depth"))[0]
    assert "\n" not in str(caught.value)
