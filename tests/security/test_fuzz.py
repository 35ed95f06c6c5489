"""Whatever bytes come in, what comes out is a value, or ValueError or FileNotFoundError with one line.

The quick tests try the same few inputs each time; ``-m slow`` tries a thousand new ones for each kind of file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from m3bsr import Plan, load_delta, reprogram, save_delta
from m3bsr.backbones import load_weights, read_weights
from m3bsr.backbones.moe_vit import MoEVisionTransformer
from m3bsr.cli.common import read_config
from m3bsr.cli.options import parse_cli
from m3bsr.cli.predict import upright
from m3bsr.config import Config
from m3bsr.data.files import read_array, read_grey, read_image, read_labels, read_names
from m3bsr.data.folder import CLASSES_FILE, names_of, read_classes_of
from m3bsr.data.pascal import read_label_map, read_parts
from m3bsr.data.targets import class_table
from m3bsr.engine import checkpoint, newest_checkpoint
from m3bsr.engine.log import RunLog, read_log
from m3bsr.engine.schedule import make_schedule
from m3bsr.report.run import read_json

QUICK, MANY = 10, 1000


def only_user_errors(call: Callable[..., Any], *args: Any) -> None:
    try:
        call(*args)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and "\n" not in str(error), repr(error)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """``whole`` with bytes changed, left out and put in; now and then nothing of it is left."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 6))):
        # Headers lie at the beginning, directories at the end.
        place = draw(st.one_of(st.integers(0, 64), st.integers(0, len(data)), st.integers(0, 64).map(lambda n: -n)))
        match draw(st.sampled_from(("change", "bits", "cut", "insert", "end"))):
            case "change":
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=8))
            case "bits" if 0 <= place < len(data):
                data[place] ^= draw(st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, 255)))
            case "cut":
                del data[place : place + draw(st.integers(1, 40))]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=40))
            case "end":
                del data[place:]
    return bytes(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def fuzz_config_bytes(data: Any, folder: Path) -> None:
    (folder / "config.json").write_bytes(data.draw(damaged(Config().to_json().encode())))
    only_user_errors(read_config, folder)


def fuzz_config_values(data: Any, folder: Path) -> None:
    config = Config().to_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from(sorted(config)))
        if isinstance(config[section], dict) and config[section]:
            config[section][data.draw(st.sampled_from(sorted(config[section])) | st.text(max_size=5))] = data.draw(JSON)
        else:
            config[section] = data.draw(JSON)
    only_user_errors(Config.from_dict, config)


def fuzz_command_line(data: Any, folder: Path) -> None:
    names = [f"--{s}.{f.replace('_', '-')}" for s, fields in Config().to_dict().items() for f in fields]
    word = (
        st.sampled_from(names) | st.text(max_size=8) | st.integers().map(str) | st.sampled_from(["None", "-1", "a=1"])
    )
    path = folder / "config.py"
    path.write_text("from m3bsr.config import Config\nconfig = Config()\n")
    words = [word for word in data.draw(st.lists(word, max_size=5)) if word not in ("-h", "--help")]
    only_user_errors(parse_cli, [str(path), *words], "")


def fuzz_split_files(data: Any, folder: Path) -> None:
    path = folder / "train.txt"
    path.write_bytes(data.draw(damaged("0001\n0002\nein Bild mit ü\n".encode())))
    only_user_errors(read_names, path)
    (folder / "semseg.txt").write_bytes(path.read_bytes())
    only_user_errors(names_of, folder, "semseg")
    (folder / CLASSES_FILE).write_bytes(data.draw(damaged(b'name,class\na.jpg,cat\n"b","dog, small"\n')))
    only_user_errors(read_classes_of, folder)


def fuzz_logs(data: Any, folder: Path) -> None:
    """Every whole line is kept, whatever stands before and behind it, and none is double after a resume."""
    good = [{"kind": "train", "step": step, "loss": 0.5} for step in (1, 2, 3)]
    whole = "".join(json.dumps(record) + "\n" for record in good).encode()
    path = folder / "log.jsonl"
    path.write_bytes(whole + data.draw(damaged(whole)))
    assert read_log(path)[:3] == good
    with contextlib.closing(RunLog(folder, start_step=2, tensorboard=False)):
        assert all(record["step"] <= 2 for record in read_log(path)) and read_log(path)[:2] == good[:2]
    (folder / "result.json").write_bytes(data.draw(damaged(b'{"step": 1, "metrics": {}}')))
    only_user_errors(read_json, folder / "result.json")


def picture(name: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    mode = Image.fromarray(pixels).convert(options.pop("mode", "RGB"))
    file = io.BytesIO()
    mode.save(file, name, **options)
    return file.getvalue()


@cache
def pictures() -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        picture("JPEG", exif=exif),
        picture("PNG"),
        picture("PNG", mode="P"),
        picture("PNG", mode="1"),
        picture("PNG", mode="I;16") if hasattr(Image, "I16") else picture("PNG", mode="L"),
        picture("WEBP", exif=exif),
        picture("TIFF", compression="tiff_lzw"),
        picture("BMP"),
        picture("PPM"),
        picture("GIF"),
    ]


def fuzz_images(data: Any, folder: Path) -> None:
    path = folder / "a.jpg"
    path.write_bytes(data.draw(damaged(data.draw(st.sampled_from(pictures())))))
    for read in (read_image, read_grey, upright):
        only_user_errors(read, path)
    only_user_errors(read_labels, path, class_table(40))


@cache
def array_files() -> dict[str, bytes]:
    files = {}
    for name, array in {"depth": np.ones((4, 5), np.float32), "normals": np.ones((4, 5, 3))}.items():
        file = io.BytesIO()
        np.save(file, array)
        files[name] = file.getvalue()
    for name, content in {
        "map": {"LabelMap": np.ones((4, 5))},
        "anno": {"anno": {"objects": {"class_ind": 15, "parts": {"part_name": "head", "mask": np.eye(3)}}}},
    }.items():
        for compress in (False, True):
            file = io.BytesIO()
            scipy.io.savemat(file, content, do_compression=compress)
            files[f"{name}-{compress}"] = file.getvalue()
    return files


def fuzz_arrays(data: Any, folder: Path) -> None:
    name = data.draw(st.sampled_from(sorted(array_files())))
    path = folder / "a"
    path.write_bytes(data.draw(damaged(array_files()[name])))
    if "-" in name:
        only_user_errors(read_label_map, path)
        only_user_errors(read_parts, path)
    else:
        only_user_errors(read_array, path, 1)


def vit() -> Any:
    return MoEVisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=1, num_heads=2, moe_blocks=())


@cache
def weight_files(scratch: Path) -> dict[str, bytes]:
    state = {name: tensor.clone() for name, tensor in vit().state_dict().items()}
    torch.save(state, scratch / "a.pth")
    torch.save(state, scratch / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, scratch / "a.safetensors")
    np.savez(scratch / "a.npz", **{"embedding/kernel": np.ones((16, 16, 3, 8), np.float32), "cls": np.ones((1, 1, 8))})
    return {path.name: path.read_bytes() for path in scratch.glob("*.*")}


def fuzz_weights(data: Any, folder: Path) -> None:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    files = weight_files(scratch)
    name = data.draw(st.sampled_from(sorted(files)))
    path = folder / name
    path.write_bytes(data.draw(damaged(files[name])))
    if not name.endswith(".npz"):
        only_user_errors(read_weights, path)
    only_user_errors(load_weights, vit(), path)


@cache
def base() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=12, num_heads=2, num_classes=3)


def fuzz_deltas(data: Any, folder: Path) -> None:
    whole = folder / "whole.safetensors"
    if not whole.exists():
        save_delta(reprogram(base(), Plan(train_blocks=(1,))), whole, base_name="tiny")
    path = folder / "a.safetensors"
    path.write_bytes(data.draw(damaged(whole.read_bytes())))
    only_user_errors(load_delta, base(), path)


def parts() -> tuple[nn.Module, Any, Any, Any]:
    model = nn.Linear(3, 2)
    groups = [{"params": list(model.parameters()), "param_names": ["weight", "bias"]}]
    optimizer = torch.optim.AdamW(groups)
    return (
        model,
        optimizer,
        make_schedule("cosine", optimizer, total_steps=4),
        torch.amp.GradScaler("cpu", enabled=False),
    )


def fuzz_checkpoints(data: Any, folder: Path) -> None:
    """One file is damaged; its checksum is put right again, as whoever means harm would do."""
    model, optimizer, scheduler, scaler = parts()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    saved = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "model": model}
    last = folder / "checkpoints" / "last"
    checkpoint.save_checkpoint(last, config={"a": 1}, progress={"step": 1, "total_steps": 4}, **saved)
    name = data.draw(st.sampled_from(("model.safetensors", "state.pt", "manifest.json", "config.json")))
    if name == "state.pt" and data.draw(st.booleans()):  # a whole file of another content
        state = torch.load(last / name, weights_only=True)
        state[data.draw(st.sampled_from(sorted(state)))] = data.draw(JSON)
        torch.save(state, last / name)
    else:
        (last / name).write_bytes(data.draw(damaged((last / name).read_bytes())))
    if name != "manifest.json":
        manifest = json.loads((last / "manifest.json").read_text())
        manifest["sha256"][name] = hashlib.sha256((last / name).read_bytes()).hexdigest()
        (last / "manifest.json").write_text(json.dumps(manifest))
    newest_checkpoint(last.parent)  # whatever it finds, it looks on
    only_user_errors(checkpoint.load_weights, nn.Linear(3, 2), last)
    only_user_errors(lambda: checkpoint.resume(last, *parts(), total_steps=4))


FUZZ = {name.removeprefix("fuzz_"): value for name, value in list(globals().items()) if name.startswith("fuzz_")}


def try_out(name: str, folder: Path, number: int, same_each_time: bool) -> int:
    """Give so many inputs to a function of ``FUZZ``; how many came to an end (hypothesis may give fewer)."""
    health = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    random_state = torch.get_rng_state()  # resuming sets it
    num_tried = 0

    @settings(
        max_examples=number, deadline=None, database=None, derandomize=same_each_time, suppress_health_check=health
    )
    @given(st.data())
    def run(data: Any) -> None:
        nonlocal num_tried
        FUZZ[name](data, folder)
        num_tried += 1

    try:
        run()
    finally:
        torch.set_rng_state(random_state)
    return num_tried


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUZZ)
def test_a_few_inputs(tmp_path, name):
    assert try_out(name, tmp_path, QUICK, same_each_time=True) >= QUICK / 2


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUZZ)
def test_many_inputs(tmp_path, name):
    assert try_out(name, tmp_path, MANY, same_each_time=False) > QUICK


def test_what_earlier_runs_found(tmp_path):
    """A field named by a line break, a zip file that spans two disks, a delta that names another tensor."""
    only_user_errors(Config.from_dict, {"bsr": {"\n": None}})
    only_user_errors(Config.from_dict, {"b\nr": {}})
    path = tmp_path / "a.pth"
    packed = bytearray(weight_files(tmp_path)["a.pth"])
    disks = packed.rfind(b"PK\x06\x07") + 16
    assert disks > 16
    packed[disks] = 2
    path.write_bytes(packed)
    only_user_errors(read_weights, path)
    path = tmp_path / "delta.safetensors"
    save_delta(reprogram(base(), Plan(train_blocks=(1,))), path, base_name="tiny")
    whole = path.read_bytes()
    for name in (b" locks", b"\\\\ncks"):  # as long, so that the header keeps its length
        path.write_bytes(whole.replace(b'{\\"blocks', b'{\\"' + name, 1))
        assert path.read_bytes() != whole
        only_user_errors(load_delta, base(), path)
