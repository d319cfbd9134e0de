"""Checkpoints of the published training code: what is inferred, what must be told, and what is refused."""

import io
import math
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddsm_engine.errors import CheckpointError
from ddsm_engine.networks.unet import UNet
from ddsm_engine.noise_schedule import NoiseSchedule
from ddsm_export.checkpoints import Facts, Weights, facts_from_flagfile, open_supernet, read_checkpoint
from ddsm_export.checkpoints.instructions import MAX_PICKLE_BYTES
from ddsm_export.supernet import load_supernet, save_supernet

Shapes = dict[str, tuple[int, ...]]

FACTS = Facts(groups=8, image_size=8, beta_start=1e-4, beta_end=0.02, variance_type="fixed_large")
TABLE = "time_embedding.timembedding.0.weight"

PUBLISHED_FLAGFILE = """\
--T=1000
--attn=1
--batch_size=256
--beta_1=0.0001
--beta_T=0.02
--ch=128
--ch_mult=1
--ch_mult=2
--ch_mult=2
--ch_mult=2
--dropout=0.1
--noeval
--fid_cache=./stats/cifar10.train.npz
--img_size=32
--log_dir=
--mean_type=epsilon
--num_res_blocks=2
--parallel
--var_type=fixedlarge
--slimmable_unet
--sandwich
--candidate_width=0.75
--candidate_width=0.5
"""


# --- the published layout, written down independently of the reader ---------------------------------------------------


def _layer(key: str, *shape: int) -> Shapes:
    return {f"{key}.weight": shape, f"{key}.bias": (shape[0],)}


def _residual(key: str, c_in: int, c_out: int, tdim: int, *, attn: bool) -> Shapes:
    shapes = {
        **_layer(f"{key}.block1.0", c_in),
        **_layer(f"{key}.block1.2", c_out, c_in, 3, 3),
        **_layer(f"{key}.temb_proj.1", c_out, tdim),
        **_layer(f"{key}.block2.0", c_out),
        **_layer(f"{key}.block2.3", c_out, c_out, 3, 3),
    }
    if c_in != c_out:
        shapes |= _layer(f"{key}.shortcut", c_out, c_in, 1, 1)
    if attn:
        shapes |= _layer(f"{key}.attn.group_norm", c_out)
        for name in ("proj_q", "proj_k", "proj_v", "proj"):
            shapes |= _layer(f"{key}.attn.{name}", c_out, c_out, 1, 1)
    return shapes


def published_shapes(
    ch: int = 16,
    ch_mult: tuple[int, ...] = (1, 2),
    attn: tuple[int, ...] = (1,),
    num_res_blocks: int = 1,
    timesteps: int = 10,
) -> Shapes:
    tdim = 4 * ch
    shapes: Shapes = {TABLE: (timesteps, ch)}
    shapes |= _layer("time_embedding.timembedding.1", tdim, ch) | _layer("time_embedding.timembedding.3", tdim, tdim)
    shapes |= _layer("head", ch, 3, 3, 3)
    now, skips, n = ch, [ch], 0
    for level, mult in enumerate(ch_mult):
        for _ in range(num_res_blocks):
            shapes |= _residual(f"downblocks.{n}", now, ch * mult, tdim, attn=level in attn)
            now, n = ch * mult, n + 1
            skips.append(now)
        if level < len(ch_mult) - 1:
            shapes |= _layer(f"downblocks.{n}.main", now, now, 3, 3)
            n += 1
            skips.append(now)
    shapes |= _residual("middleblocks.0", now, now, tdim, attn=True)
    shapes |= _residual("middleblocks.1", now, now, tdim, attn=False)
    n = 0
    for level in range(len(ch_mult) - 1, -1, -1):
        for _ in range(num_res_blocks + 1):
            shapes |= _residual(f"upblocks.{n}", now + skips.pop(), ch * ch_mult[level], tdim, attn=level in attn)
            now, n = ch * ch_mult[level], n + 1
        if level:
            shapes |= _layer(f"upblocks.{n}.main", now, now, 3, 3)
            n += 1
    return shapes | _layer("tail.0", now) | _layer("tail.2", 3, now, 3, 3)


def published_state(shapes: Shapes | None = None, *, seed: int = 0) -> "OrderedDict[str, Tensor]":
    """Random weights; the table as the formula says, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = published_shapes() if shapes is None else shapes
    state = OrderedDict((key, torch.randn(shape, generator=generator) * 0.1) for key, shape in shapes.items())
    rows, columns = shapes[TABLE]
    state[TABLE] = torch.tensor(
        [
            [(math.sin, math.cos)[j % 2](t / 10000 ** (2 * (j // 2) / columns)) for j in range(columns)]
            for t in range(rows)
        ]
    )
    return state


def training_checkpoint() -> dict[str, Any]:
    net, ema = published_state(seed=1), published_state(seed=2)
    return {
        "net_model": net,
        "ema_model": ema,
        "sched": {"last_epoch": 7, "lr_lambdas": [None]},
        "optim": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4e-4, "params": [0]}]},
        "step": 400000,
        "x_T": torch.randn(4, 3, 8, 8),
    }


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], Path]:
    def write(content: object) -> Path:
        path = tmp_path / "ckpt.pt"
        torch.save(content, path)
        return path

    return write


def refusal(path: Path, facts: Facts = FACTS, weights: Weights = "ema") -> str:
    """The one line of a refusal; anything else that happens fails the test."""
    with pytest.raises(CheckpointError) as caught:
        open_supernet(path, facts, weights)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- what is read -----------------------------------------------------------------------------------------------------


def test_the_layout_of_these_tests_is_the_published_one() -> None:
    shapes = published_shapes(128, (1, 2, 2, 2), (1,), 2, 1000)
    assert len(shapes) == 329
    assert sum(math.prod(shape) for shape in shapes.values()) == 35_874_307


@pytest.mark.parametrize(
    ("ch", "ch_mult", "attn", "num_res_blocks", "groups", "image_size"),
    [
        pytest.param(32, (1, 2, 2, 2), (1,), 2, 32, 32, id="cifar-10"),
        pytest.param(16, (1, 2, 2, 2, 4), (1,), 2, 16, 64, id="celeba"),
        pytest.param(16, (1, 2, 3), (0, 2), 3, 8, 8, id="attention-on-two-levels"),
        pytest.param(16, (2,), (), 1, 8, 5, id="one-level-without-attention"),
    ],
)
def test_the_topology_is_inferred_from_keys_and_shapes(
    save: Callable[[object], Path],
    ch: int,
    ch_mult: tuple[int, ...],
    attn: tuple[int, ...],
    num_res_blocks: int,
    groups: int,
    image_size: int,
) -> None:
    path = save(published_state(published_shapes(ch, ch_mult, attn, num_res_blocks, timesteps=20)))
    spec = read_checkpoint(path, replace(FACTS, groups=groups, image_size=image_size, dropout=0.1)).spec
    assert (spec.base_channels, spec.channel_mults, spec.attention_levels) == (ch, ch_mult, attn)
    assert (spec.num_res_blocks, spec.timesteps, spec.channels) == (num_res_blocks, 20, 3)
    assert (spec.time_features, spec.time_dim) == (ch, 4 * ch)
    assert (spec.groups, spec.image_size, spec.dropout) == (groups, image_size, 0.1)
    assert (spec.conv_multiple, spec.linear_multiple) == (8, 16)


def test_every_kind_of_layer_finds_its_place(save: Callable[[object], Path]) -> None:
    state = published_state()
    weights = read_checkpoint(save(state), FACTS).weights
    places = {
        "time.linear1.weight": "time_embedding.timembedding.1.weight",
        "time.linear2.bias": "time_embedding.timembedding.3.bias",
        "head.weight": "head.weight",
        "down.0.norm1.weight": "downblocks.0.block1.0.weight",
        "down.0.conv1.bias": "downblocks.0.block1.2.bias",
        "down.0.time.weight": "downblocks.0.temb_proj.1.weight",
        "down.1.conv.weight": "downblocks.1.main.weight",
        "down.2.shortcut.weight": "downblocks.2.shortcut.weight",
        "down.2.norm2.bias": "downblocks.2.block2.0.bias",
        "down.2.conv2.weight": "downblocks.2.block2.3.weight",
        "middle.0.attention.norm.weight": "middleblocks.0.attn.group_norm.weight",
        "middle.0.attention.q.weight": "middleblocks.0.attn.proj_q.weight",
        "middle.0.attention.k.weight": "middleblocks.0.attn.proj_k.weight",
        "middle.0.attention.v.weight": "middleblocks.0.attn.proj_v.weight",
        "middle.0.attention.out.weight": "middleblocks.0.attn.proj.weight",
        "middle.1.conv1.weight": "middleblocks.1.block1.2.weight",
        "up.0.attention.out.bias": "upblocks.0.attn.proj.bias",
        "up.2.conv.weight": "upblocks.2.main.weight",
        "up.4.shortcut.bias": "upblocks.4.shortcut.bias",
        "tail.norm.weight": "tail.0.weight",
        "tail.conv.weight": "tail.2.weight",
    }
    for ours, theirs in places.items():
        assert torch.equal(weights[ours], state[theirs]), ours
    # And each of the others has exactly one place: random values do not repeat.
    firsts = {tensor.flatten()[0].item() for tensor in weights.values()}
    assert len(firsts) == len(weights) == len(state) - 1
    assert firsts == {tensor.flatten()[0].item() for key, tensor in state.items() if key != TABLE}


def test_the_weights_run_in_the_network_of_their_spec(save: Callable[[object], Path]) -> None:
    supernet = read_checkpoint(save(training_checkpoint()), FACTS)
    network = UNet(supernet.spec, supernet.spec.base_channels)
    network.load_state_dict(dict(supernet.weights), strict=True)
    out = network(torch.randn(2, 3, 8, 8), torch.randn(2, 16))
    assert out.shape == (2, 3, 8, 8)
    assert out.std() > 0.01


def test_the_schedule_is_the_one_that_the_facts_say(save: Callable[[object], Path]) -> None:
    supernet = read_checkpoint(save(published_state()), replace(FACTS, beta_end=0.03, variance_type="fixed_small"))
    assert supernet.noise_schedule == NoiseSchedule(1e-4, 0.03, 10, "fixed_small")


def test_the_moving_average_is_the_default_and_the_raw_network_a_choice(save: Callable[[object], Path]) -> None:
    content = training_checkpoint()
    path = save(content)
    ema, net = read_checkpoint(path, FACTS), read_checkpoint(path, FACTS, "net")
    assert torch.equal(ema.weights["head.weight"], content["ema_model"]["head.weight"])
    assert torch.equal(net.weights["head.weight"], content["net_model"]["head.weight"])
    assert not torch.equal(ema.weights["head.weight"], net.weights["head.weight"])
    assert (ema.provenance["weights"], net.provenance["weights"]) == ("ema", "net")


def test_the_provenance_tells_file_hash_and_step(save: Callable[[object], Path]) -> None:
    provenance = read_checkpoint(save(training_checkpoint()), FACTS).provenance
    assert provenance["format"] == "ddsm-checkpoint"
    assert (provenance["source"], provenance["step"]) == ("ckpt.pt", 400000)
    assert re.fullmatch("[0-9a-f]{64}", provenance["sha256"])


def test_a_bare_state_dict_is_read_and_says_so(save: Callable[[object], Path]) -> None:
    state = published_state()
    supernet = read_checkpoint(save(state), FACTS)
    assert torch.equal(supernet.weights["tail.conv.bias"], state["tail.2.bias"])
    assert supernet.provenance["weights"] == "bare"
    assert "step" not in supernet.provenance


def test_the_prefix_of_data_parallel_is_stripped(save: Callable[[object], Path]) -> None:
    state = published_state()
    content = {"ema_model": {f"module.{key}": tensor for key, tensor in state.items()}, "step": 1}
    supernet = read_checkpoint(save(content), FACTS)
    assert torch.equal(supernet.weights["head.weight"], state["head.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_float32(save: Callable[[object], Path], dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in published_state().items()}
    weights = read_checkpoint(save(state), FACTS).weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["head.weight"], state["head.weight"].float())


def test_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    content = training_checkpoint()
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pt")
    supernet = read_checkpoint(tmp_path / "old.pt", FACTS)
    assert torch.equal(supernet.weights["head.weight"], content["ema_model"]["head.weight"])


def test_the_weights_outlive_the_file(save: Callable[[object], Path]) -> None:
    content = training_checkpoint()
    path = save(content)
    weights = read_checkpoint(path, FACTS).weights
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(weights["head.weight"], content["ema_model"]["head.weight"])


# --- the project's own file -------------------------------------------------------------------------------------------


@pytest.fixture
def own_file(save: Callable[[object], Path], tmp_path: Path) -> Path:
    supernet = read_checkpoint(save(training_checkpoint()), FACTS)
    save_supernet(supernet, tmp_path / "supernet.bin")
    return tmp_path / "supernet.bin"


def test_a_supernet_survives_its_own_file(own_file: Path, tmp_path: Path) -> None:
    read = open_supernet(tmp_path / "ckpt.pt", FACTS)
    for loaded in (load_supernet(own_file), open_supernet(own_file, Facts()), open_supernet(own_file, FACTS)):
        assert (loaded.spec, loaded.noise_schedule) == (read.spec, read.noise_schedule)
        assert loaded.provenance == read.provenance
        assert loaded.weights.keys() == read.weights.keys()
        assert all(torch.equal(loaded.weights[name], read.weights[name]) for name in read.weights)


def test_facts_that_contradict_the_own_file_are_refused_by_name(own_file: Path) -> None:
    message = refusal(own_file, Facts(groups=16, beta_end=0.03, image_size=8))
    assert "--groups 16 (the file says 8)" in message
    assert "--beta-T 0.03 (the file says 0.02)" in message
    assert "--image-size" not in message
    assert "--T 5 (the file says 10)" in refusal(own_file, Facts(timesteps=5))


def test_the_own_file_has_no_raw_weights_to_choose(own_file: Path, tmp_path: Path) -> None:
    assert "leave out --weights net" in refusal(own_file, Facts(), weights="net")
    save_supernet(read_checkpoint(tmp_path / "ckpt.pt", FACTS, "net"), own_file)
    assert open_supernet(own_file, Facts(), "net").provenance["weights"] == "net"


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "without a supernet's spec" in refusal(tmp_path / "other.safetensors")


# --- what a checkpoint cannot tell ------------------------------------------------------------------------------------


def test_every_missing_fact_is_named_at_once(save: Callable[[object], Path]) -> None:
    message = refusal(save(training_checkpoint()), Facts())
    for option in (
        "--groups",
        "--image-size",
        "--beta-1",
        "--beta-T",
        "--var-type fixedlarge|fixedsmall",
        "--flagfile",
    ):
        assert option in message


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("groups", "--groups"),
        ("image_size", "--image-size"),
        ("beta_start", "--beta-1"),
        ("beta_end", "--beta-T"),
        ("variance_type", "--var-type"),
    ],
)
def test_only_the_missing_fact_is_named(save: Callable[[object], Path], name: str, option: str) -> None:
    message = refusal(save(training_checkpoint()), replace(FACTS, **{name: None}))
    named = set(re.findall(r"--[\w-]+", message))
    assert named == {option, "--flagfile"}


def test_options_win_over_the_flagfile() -> None:
    flagfile = replace(FACTS, dropout=0.1)
    merged = Facts(groups=16, dropout=0.0).over(flagfile)
    assert merged == replace(FACTS, groups=16, dropout=0.0)
    assert Facts().over(flagfile) == flagfile


def test_multiples_can_be_told(save: Callable[[object], Path]) -> None:
    spec = read_checkpoint(save(published_state()), replace(FACTS, conv_multiple=16, linear_multiple=8)).spec
    assert (spec.conv_multiple, spec.linear_multiple) == (16, 8)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"groups": 3}, "cannot be normalised in 3 groups"),
        ({"image_size": 9}, "cannot be halved"),
        ({"beta_start": 0.5}, "betas must satisfy"),
        ({"beta_end": math.nan}, "betas must satisfy"),
        ({"dropout": 1.5}, "dropout"),
        ({"image_size": 16}, r"contradicted by x_T, whose samples have the shape \(3, 8, 8\)"),
        ({"base_channels": 32}, r"--ch 32 \(the file says 16\)"),
        ({"channel_mults": (1, 2, 2)}, r"--ch_mult \(1, 2, 2\) \(the file says \(1, 2\)\)"),
        ({"attention_levels": (0,)}, r"--attn \(0,\) \(the file says \(1,\)\)"),
        ({"num_res_blocks": 2}, r"--num_res_blocks 2 \(the file says 1\)"),
        ({"timesteps": 1000, "base_channels": 8}, r"--ch 8 .*--T 1000 \(the file says 10\)"),
    ],
)
def test_facts_that_cannot_be_are_refused(save: Callable[[object], Path], facts: Mapping[str, Any], words: str) -> None:
    assert re.search(words, refusal(save(training_checkpoint()), replace(FACTS, **facts)))


# --- flagfile.txt -----------------------------------------------------------------------------------------------------


@pytest.fixture
def flagfile(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "flagfile.txt"
        path.write_text(text)
        return path

    return write


def test_the_published_flagfile_tells_everything(flagfile: Callable[[str], Path]) -> None:
    assert facts_from_flagfile(flagfile(PUBLISHED_FLAGFILE)) == Facts(
        groups=32,
        image_size=32,
        beta_start=1e-4,
        beta_end=0.02,
        variance_type="fixed_large",
        dropout=0.1,
        base_channels=128,
        channel_mults=(1, 2, 2, 2),
        attention_levels=(1,),
        num_res_blocks=2,
        timesteps=1000,
    )


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("--slimmable_unet\n--slimmable_g16", 16),
        ("--slimmable_unet=True\n--slimmable_g16=true", 16),
        ("--slimmable_g16", 16),
        ("--slimmable_unet\n--noslimmable_g16", 32),
        ("--slimmable_unet\n--slimmable_g16=False", 32),
        ("--slimmable_unet", 32),
        ("--noslimmable_g16", 32),
        ("--slimmable_g16\n--noslimmable_g16\n", 32),
        ("--img_size=32", None),
        ("# --slimmable_g16\n// --slimmable_unet", None),
        ("", None),
    ],
)
def test_the_groups_follow_from_the_published_flags(
    flagfile: Callable[[str], Path], text: str, groups: int | None
) -> None:
    assert facts_from_flagfile(flagfile(text)) == replace(
        Facts(), groups=groups, image_size=32 if "img_size" in text else None
    )


def test_an_absent_flag_is_not_guessed(flagfile: Callable[[str], Path]) -> None:
    assert facts_from_flagfile(flagfile("\n# a comment\n  --beta_1=2e-4  \n-T=10\n")) == Facts(
        beta_start=2e-4, timesteps=10
    )


def test_lists_may_be_written_on_one_line(flagfile: Callable[[str], Path]) -> None:
    facts = facts_from_flagfile(flagfile("--ch_mult=1,2,2,4\n--attn=2\n--attn=1\n--var_type=fixedsmall"))
    assert facts == Facts(channel_mults=(1, 2, 2, 4), attention_levels=(1, 2), variance_type="fixed_small")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("--ch=128\nch 128", r"line 2: expected --flag=value, --flag or --noflag, found 'ch 128'"),
        ("--ch 128", "line 1: expected --flag=value"),
        ("--ch", "line 1: expected --ch=value"),
        ("--", "line 1"),
        ("--ch=wide", "a whole number for --ch, found 'wide'"),
        ("--ch_mult=1,,2", "whole numbers for --ch_mult, found ''"),
        ("--beta_1=small", "a number for --beta_1"),
        ("--var_type=learned", "fixedlarge or fixedsmall for --var_type, found 'learned'"),
        ("--slimmable_g16=maybe", "True or False for --slimmable_g16"),
        ("--mean_type=xstart", "expected epsilon"),
        ("--noslimmable_unet", "one dense network"),
        ("--flagfile=other.txt", "includes another file"),
        ("# " + "x" * 70000, "at most 65536 bytes"),
    ],
)
def test_a_flagfile_that_cannot_be_is_refused(flagfile: Callable[[str], Path], text: str, words: str) -> None:
    path = flagfile(text)
    with pytest.raises(CheckpointError, match=words) as caught:
        facts_from_flagfile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_and_absent_flagfiles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flagfile.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="no UTF-8"):
        facts_from_flagfile(tmp_path / "flagfile.txt")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        facts_from_flagfile(tmp_path / "absent.txt")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        facts_from_flagfile(tmp_path)


# --- which set of weights ---------------------------------------------------------------------------------------------


def test_a_set_that_is_not_there_is_refused_with_the_option_that_helps(save: Callable[[object], Path]) -> None:
    content = training_checkpoint()
    ema = content.pop("ema_model")
    path = save(content)
    assert "expected ema_model, found only net_model: add --weights net" in refusal(path)
    assert read_checkpoint(path, FACTS, "net").provenance["weights"] == "net"
    path = save({"ema_model": ema})
    assert "expected net_model, found only ema_model: add --weights ema" in refusal(path, weights="net")


def test_a_bare_state_dict_has_no_raw_weights_to_choose(save: Callable[[object], Path]) -> None:
    assert "leave out --weights net" in refusal(save(published_state()), weights="net")


# --- files that are no checkpoint -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 bytes"),
        (b"step,loss\n1,0.5\n", "is not a training checkpoint.*b'step'"),
        (random.Random(3).randbytes(5000), "is not a training checkpoint"),
        (b"\x80\x02" + random.Random(4).randbytes(5000), "truncated, damaged or no checkpoint"),
        (b"\x80\x04" + random.Random(5).randbytes(5000), "a pickle that torch.save did not write"),
        (b"PK\x03\x04" + random.Random(6).randbytes(5000), "truncated, damaged or no checkpoint"),
        (b"\x80\x02", "truncated, damaged or no checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "file.pt").write_bytes(data)
    assert re.search(words, refusal(tmp_path / "file.pt"))


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "found no such file" in refusal(tmp_path / "absent.pt")
    assert "found no such file" in refusal(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, *, zipped: bool, kept: float) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(training_checkpoint(), path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "truncated, damaged" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_never_give_a_traceback(tmp_path: Path, *, zipped: bool) -> None:
    path = tmp_path / "ckpt.pt"
    content = {"ema_model": published_state(published_shapes(ch_mult=(1,), attn=(), timesteps=2)), "step": 1}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    # The pickle lies at the front; most of the rest is weights, where any bit pattern is a number.
    pickled = max(data.find(b"tail.2.bias") + 200, 4000)
    generator, refusals = random.Random(0), []
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            damaged[generator.randrange(pickled)] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path, replace(FACTS, image_size=4))
        except CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert not any("\n" in message for message in refusals)


def test_archives_of_other_kinds_are_refused(tmp_path: Path, save: Callable[[object], Path]) -> None:
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    assert "no checkpoint of torch.save" in refusal(path)
    with (
        zipfile.ZipFile(save(training_checkpoint())) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in source.namelist():
            new.writestr(item, source.read(item))
    assert "is a compressed archive" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/constants.pkl", b"")
        archive.writestr("model/version", b"3\n")
    assert "it is a TorchScript program" in refusal(path)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("byteorder", f"its record byteorder has more than {MAX_PICKLE_BYTES} bytes"),
        ("constants.pkl", f"its record constants.pkl has more than {MAX_PICKLE_BYTES} bytes"),
        ("version", "failed reading file version"),
    ],
)
def test_records_that_torch_reads_whole_are_refused_unread_if_they_are_large(
    tmp_path: Path, save: Callable[[object], Path], record: str, words: str
) -> None:
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(save(training_checkpoint())) as source, zipfile.ZipFile(path, "w") as new:
        for item in source.namelist():
            if not item.endswith(f"/{record}"):
                new.writestr(item, source.read(item))
        new.writestr(f"{item.partition('/')[0]}/{record}", b"0" * (MAX_PICKLE_BYTES + 1))
    assert words in refusal(path)


# --- code -------------------------------------------------------------------------------------------------------------


class _Attack:
    """Unpickled by an ordinary unpickler, this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _zipped(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _old(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


WRITERS: dict[str, tuple[Callable[[object], bytes], str]] = {
    "archive": (_zipped, "holds code or objects other than tensors"),
    "old": (_old, "holds code or objects other than tensors"),
    "pickle-2": (lambda content: pickle.dumps(content, 2), "holds code or objects other than tensors"),
    "pickle-4": (lambda content: pickle.dumps(content, 4), "can hold code and was refused"),
    "pickle-0": (lambda content: pickle.dumps(content, 0), "is not a training checkpoint"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_code_in_a_file_is_refused_and_never_run(tmp_path: Path, writer: str) -> None:
    write, words = WRITERS[writer]
    marker, path = tmp_path / "ran", tmp_path / "ckpt.pt"
    by_torch = writer in {"archive", "old"}
    path.write_bytes(write({"ema_model": {"head.bias": torch.zeros(1) if by_torch else 0}, "step": _Attack(marker)}))
    assert words in refusal(path)
    assert not marker.exists()
    # The attack is real: an ordinary unpickler runs it.
    torch.load(path, weights_only=False) if by_torch else pickle.loads(path.read_bytes())
    assert marker.exists()


def test_a_whole_module_is_refused(save: Callable[[object], Path]) -> None:
    message = refusal(save(torch.nn.Linear(2, 2)))
    assert "holds code or objects other than tensors (torch.nn.modules.linear.Linear)" in message


# --- weights that do not fit ------------------------------------------------------------------------------------------


def _changed(**changes: Tensor | object) -> dict[str, Any]:
    return {**published_state(), **changes}


def _without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in published_state().items() if key not in keys}


def _spoilt(key: str, value: float) -> dict[str, Any]:
    state = published_state()
    state[key].view(-1)[-1] = value
    return state


def _misfits() -> Iterator[Any]:
    key = "upblocks.0.block2.3.weight"
    yield pytest.param([torch.zeros(2)], "holds a list; expected a training checkpoint", id="list")
    yield pytest.param(torch.zeros(2), "holds a Tensor; expected a training checkpoint", id="tensor")
    yield pytest.param({"state_dict": published_state()}, "found state_dict", id="nested")
    yield pytest.param({}, "expected a dict with ema_model or net_model.*found none", id="empty-dict")
    yield pytest.param({"ema_model": None}, "expected ema_model to be a dict of tensors, found NoneType", id="no-dict")
    yield pytest.param({"ema_model": {}}, "which has head.weight; found none", id="empty-state")
    yield pytest.param(
        {"conv_in.weight": torch.zeros(8, 3, 3, 3), "conv_out.bias": torch.zeros(3)},
        "another architecture.*head.weight; found conv_in.weight, conv_out.bias",
        id="other-architecture",
    )
    yield pytest.param(_without(TABLE), f"another architecture.*{re.escape(TABLE)}", id="no-table")
    yield pytest.param(_without("downblocks.0.block1.2.weight"), "another architecture.*every level", id="no-first")
    yield pytest.param(
        _without("downblocks.1.main.weight"), "missing downblocks.1.main.weight|unexpected", id="no-downsampling"
    )
    yield pytest.param(_without(key), f"missing {re.escape(key)}, unexpected none", id="missing-key")
    yield pytest.param(
        _changed(**{"cond.weight": torch.zeros(1)}), "missing none, unexpected cond.weight", id="unknown-key"
    )
    yield pytest.param(
        {f"module.{k}" if k == "head.bias" else k: v for k, v in published_state().items()},
        "missing head.bias, unexpected module.head.bias",
        id="half-a-prefix",
    )
    yield pytest.param(
        _changed(**{key: torch.zeros(32, 16, 3, 3)}),
        rf"expected {re.escape(key)} to have the shape \(32, 32, 3, 3\), found \(32, 16, 3, 3\)",
        id="wrong-shape",
    )
    yield pytest.param(_changed(**{"head.weight": torch.zeros(16)}), "head.weight to have 4 axes", id="wrong-axes")
    yield pytest.param(
        _changed(**{"downblocks.2.block1.2.weight": torch.zeros(24, 16, 3, 3)}),
        r"multiples of the head's 16, found \[16, 24\]",
        id="no-multiple",
    )
    yield pytest.param(_changed(**{"head.weight": torch.zeros(0, 3, 3, 3)}), "multiples of the head's 0", id="zero")
    yield pytest.param(_spoilt("tail.2.bias", math.nan), "tail.2.bias holds a value that is not finite", id="nan")
    yield pytest.param(_spoilt("tail.0.weight", math.inf), "tail.0.weight holds a value that is not", id="inf")
    yield pytest.param(
        _changed(**{"head.bias": torch.full((16,), 1e300, dtype=torch.float64)}),
        "head.bias holds a value that is not finite",
        id="overflow",
    )
    yield pytest.param(_changed(**{key: [1.0, 2.0]}), f"{re.escape(key)} to be a tensor, found list", id="non-tensor")
    yield pytest.param(_changed(**{key: torch.zeros(2, dtype=torch.int64)}), "found torch.int64", id="integers")
    yield pytest.param(_changed(**{key: torch.zeros(2, dtype=torch.complex64)}), "found torch.complex64", id="complex")
    yield pytest.param(
        _changed(**{key: torch.eye(3).to_sparse()}), "to be a dense tensor, found torch.sparse_coo", id="sparse"
    )
    yield pytest.param(
        _changed(**{"head.weight": torch.zeros(1).expand(60000, 60000, 3, 3)}),
        "head.weight claims the shape .*more than is stored",
        id="claimed-size",
    )
    yield pytest.param(
        _changed(**{TABLE: torch.zeros(70000, 2)}), "timesteps must be a whole number from 1 to 65536", id="absurd-size"
    )
    yield pytest.param({1: torch.zeros(2)}, "to be names, found '1'", id="key-is-no-name")
    yield pytest.param(
        {"ema_model": dict.fromkeys(map(str, range(20000)), 0.0)}, "at most 16384 keys, found 20000", id="many-keys"
    )
    table = published_state()[TABLE]
    apart = torch.cat([table[:, 0::2], table[:, 1::2]], dim=1)
    for name, other in {"apart": apart, "shifted": table.roll(1, 0), "nan": table * math.nan}.items():
        yield pytest.param(_changed(**{TABLE: other}), "is not the sinusoidal table", id=f"table-{name}")


@pytest.mark.parametrize(("content", "words"), list(_misfits()))
def test_weights_that_do_not_fit_are_refused(save: Callable[[object], Path], content: object, words: str) -> None:
    message = refusal(save(content))
    assert re.search(words, message), message


def test_the_unspoilt_state_of_these_refusals_is_accepted(save: Callable[[object], Path]) -> None:
    assert read_checkpoint(save(_changed()), FACTS).spec.base_channels == 16
    assert read_checkpoint(save(_without()), FACTS).spec.base_channels == 16
    assert read_checkpoint(save(_spoilt("tail.2.bias", 1.0)), FACTS).spec.base_channels == 16
