"""Files that are damaged, or made to harm: each is `unknown` with a reason, soon and without much memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.catalog import ROOT
from pipelines.weights.headers import MAX_DIMENSIONS, MAX_TENSORS, Tensor, read_header
from pipelines.weights.inspection import inspect_file, inspect_folder
from pipelines.weights.kinds.reports import Base, Kind
from tests.support import sparse_files

WORDS = {"emb_params": {"dtype": "F32", "shape": [2, 768], "data_offsets": [0, 6144]}}


def raw(path: Path, header: Any, body: int = 6144, length: int | None = None) -> Path:
    """A file of any header, sound or not, and a body of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    told = len(text) if length is None else length
    path.write_bytes(told.to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + body)
    return path


def entry(**changed: Any) -> dict[str, Any]:
    return {"emb_params": WORDS["emb_params"] | changed}


HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "a length of 2^63": ({"header": WORDS, "length": 2**63}, "its header should be 9,223,372,036,854,775,808 bytes"),
    "a length of 2^64 - 1": ({"header": WORDS, "length": 2**64 - 1}, "truncated or damaged"),
    "a length past the end": ({"header": WORDS, "length": 10**6}, "truncated or damaged"),
    "a length too short": ({"header": WORDS, "length": 10}, "not JSON"),
    "a length of zero": ({"header": WORDS, "length": 0}, "not JSON"),
    "a body cut short": ({"header": WORDS, "body": 6143}, "1 bytes of its tensors are missing"),
    "a body too long": ({"header": WORDS, "body": 6145}, "1 bytes follow its last tensor"),
    "no tensors": ({"header": {}, "body": 0}, "it holds no tensors"),
    "metadata alone": ({"header": {"__metadata__": {"a": "b"}}, "body": 0}, "it holds no tensors"),
    "a list": ({"header": [1]}, "not a JSON object"),
    "a word": ({"header": "word"}, "not a JSON object"),
    "not UTF-8": ({"header": b"\xff\xfe{}", "length": None}, "not UTF-8"),
    "nested without end": ({"header": b"[" * 200_000}, "nested without end"),
    "nested objects": ({"header": b'{"a":' * 100_000}, "nested without end"),
    "a name twice": ({"header": b'{"a":{"dtype":"F32"},"a":{}}'}, "names something twice"),
    "not a number": ({"header": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'}, "holds the number NaN"),
    "a number without end": ({"header": b'{"a":' + b"9" * 10_000 + b"}"}, "holds the number 999"),
    "a fraction": ({"header": entry(shape=[1.5, 2])}, "holds the number 1.5"),
    "a size below zero": ({"header": entry(shape=[-2, -768])}, "does not describe tensor emb_params"),
    "true for a size": ({"header": entry(shape=[True, 1536])}, "does not describe tensor emb_params"),
    "words for a size": ({"header": entry(shape="2x768")}, "does not describe tensor emb_params"),
    "a thousand dimensions": ({"header": entry(shape=[1] * 1000)}, "does not describe tensor emb_params"),
    "no shape": ({"header": {"emb_params": {"dtype": "F32", "data_offsets": [0, 6144]}}}, "does not describe"),
    "a tensor that is none": ({"header": {"emb_params": 7}}, "does not describe"),
    "an unknown format": ({"header": entry(dtype="F31")}, "does not describe"),
    "three offsets": ({"header": entry(data_offsets=[0, 1, 2])}, "does not describe"),
    "a shape that lies": ({"header": entry(shape=[2, 769])}, "which its shape contradicts"),
    "a shape past all numbers": ({"header": entry(shape=[2**62] * MAX_DIMENSIONS)}, "which its shape contradicts"),
    "offsets backwards": ({"header": entry(data_offsets=[6144, 0])}, "which its shape contradicts"),
    "a gap": ({"header": entry(data_offsets=[8, 6152]), "body": 6152}, "overlap or leave gaps"),
    "an overlap": ({"header": WORDS | {"b": WORDS["emb_params"]}}, "overlap or leave gaps"),
    "metadata that is none": ({"header": {"__metadata__": [1], **WORDS}}, "metadata is not"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(tmp_path: Path, name: str) -> None:
    made, said = HEADERS[name]
    report = inspect_file(raw(tmp_path / "one.safetensors", **made))
    assert (report.kind, report.base) == ("unknown", None)
    assert said in report.reason


def test_the_sound_one_is_read(tmp_path: Path) -> None:
    assert inspect_file(raw(tmp_path / "one.safetensors", WORDS)).kind == "embedding"
    header = read_header(raw(tmp_path / "two.safetensors", WORDS | {"__metadata__": {"a": "b", "c": 1}}))
    assert header.tensors == {"emb_params": Tensor("F32", (2, 768), 6144, 0)}
    assert header.metadata == {"a": "b"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\0" * 5000, "begins with zeros"),
        (b"\x10\0\0", "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"PK\x03\x04archive/data.pkl", "a pickle under another name"),
        (b"\x80\x02}q\x00.", "a pickle under another name"),
        (b"GGUF\x03\0\0\0", "GGUF"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "one.safetensors").write_bytes(content)
    report = inspect_file(tmp_path / "one.safetensors")
    assert report.kind == "unknown"
    assert said in report.reason


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".CKPT"])
def test_a_pickle_is_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "harmed").encode() + b"'\ntR.")
    path.chmod(0)
    report = inspect_file(path)
    assert report.kind == "unknown"
    assert "convert it to safetensors" in report.reason
    assert not (tmp_path / "harmed").exists()


def test_every_cut_of_a_sound_file(tmp_path: Path) -> None:
    whole = raw(tmp_path / "whole.safetensors", WORDS).read_bytes()
    for length in [*range(0, 120), *range(120, len(whole), 97)]:
        (tmp_path / "cut.safetensors").write_bytes(whole[:length])
        report = inspect_file(tmp_path / "cut.safetensors")
        assert (report.kind, bool(report.reason)) == ("unknown", True), length


def test_folders_pipes_devices_and_broken_links_are_reported(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "missing.safetensors")
    (tmp_path / "circle.safetensors").symlink_to(tmp_path / "circle.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    reasons = {report.file.name: report.reason for report in map(inspect_file, sorted(tmp_path.iterdir()))}
    assert reasons == {
        "circle.safetensors": "it cannot be read: Too many levels of symbolic links",
        "device.safetensors": "this is not a plain file",
        "folder.safetensors": "this is a folder, not a file",
        "nowhere.safetensors": "a link to nothing",
        "pipe.safetensors": "this is not a plain file",
    }
    assert inspect_file(tmp_path / ("x" * 300 + ".safetensors")).reason == "it cannot be read: File name too long"
    assert inspect_file(Path("nul\0.safetensors")).kind == "unknown"


def test_a_walk_follows_no_link_out_of_its_folder(tmp_path: Path) -> None:
    outside = raw(tmp_path / "outside.safetensors", WORDS)
    (tmp_path / "elsewhere").mkdir()
    raw(tmp_path / "elsewhere" / "far.safetensors", WORDS)
    inside = tmp_path / "inside"
    inside.mkdir()
    raw(inside / "own.safetensors", WORDS)
    (inside / "out.safetensors").symlink_to(outside)
    (inside / "in.safetensors").symlink_to(inside / "own.safetensors")
    (inside / "folder").symlink_to(tmp_path / "elsewhere")
    (inside / "loop").symlink_to(inside)
    (inside / "named.safetensors").mkdir()
    found = {report.file.name: (report.kind, report.reason) for report in inspect_folder(inside)}
    assert {name for name, (kind, _) in found.items() if kind == "embedding"} == {"own.safetensors", "in.safetensors"}
    assert "leads out of its folder" in found["out.safetensors"][1]
    assert "not followed" in found["folder"][1]
    assert "not followed" in found["loop"][1]
    assert "this is a folder" in found["named.safetensors"][1]
    assert inspect_file(inside / "out.safetensors").kind == "embedding"  # named by a person, a link is what it leads to


@pytest.mark.parametrize("named", ["../outside.safetensors", "/etc/passwd", 7, None])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, named: Any) -> None:
    raw(tmp_path / "outside.safetensors", WORDS)
    (tmp_path / "inside").mkdir()
    index = tmp_path / "inside" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"emb_params": named}}))
    assert inspect_file(index).kind == "unknown"
    for text in ("", "[]", "{", '{"weight_map": []}', "[" * 100_000):
        index.write_text(text)
        assert inspect_file(index).kind == "unknown"


MEMORY = """
import sys
from pathlib import Path
from pipelines.weights.inspection import inspect_file

def peak():  # not getrusage's, which a process inherits from the one that started it
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))

before = peak()
report = inspect_file(Path(sys.argv[1]))
print(peak() - before, report.kind, report.reason)
"""


def inspected_apart(path: Path) -> tuple[int, str]:
    """KiB of memory that inspecting a file takes a process of its own, and what it says."""
    done = subprocess.run([sys.executable, "-c", MEMORY, path], cwd=ROOT, check=True, capture_output=True, text=True)
    grown, _, told = done.stdout.partition(" ")
    return int(grown), told


def test_a_million_tiny_tensors_take_no_memory(tmp_path: Path) -> None:
    tensors = (f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(10**6))
    path = raw(tmp_path / "million.safetensors", ("{" + ",".join(tensors) + "}").encode(), body=10**6)
    grown, told = inspected_apart(path)
    assert "at most 16,777,216 are read" in told
    assert grown < 2**10


def test_as_many_tensors_as_a_header_may_hold_take_little_memory(tmp_path: Path) -> None:
    most = MAX_TENSORS + 3
    tensors = (f'"{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(most))
    path = raw(tmp_path / "many.safetensors", ("{" + ",".join(tensors) + "}").encode(), body=most)
    grown, told = inspected_apart(path)
    assert "more than 65,536 tensors" in told
    assert grown < 128 * 2**10
    empty = raw(tmp_path / "objects.safetensors", b"[" + b"{}," * 5_000_000 + b"{}]")
    grown, told = inspected_apart(empty)
    assert "more than 65,536 tensors" in told
    assert grown < 128 * 2**10


def test_a_header_is_read_and_no_tensor(tmp_path: Path) -> None:
    """Seven gigabytes that are not there: a reader that touched them would need them."""
    path = sparse_files.write(tmp_path / "large.safetensors", {"emb_params": (2, 768), "b": (3_500_000_000,)})
    assert path.stat().st_size > 7 * 10**9
    grown, _ = inspected_apart(path)
    assert grown < 2**12  # KiB


PIECES = [
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    "conv_in.weight",
    "time_embedding.linear_1.weight",
    "add_embedding.linear_1.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "controlnet_down_blocks.0.weight",
    "input_hint_block.0.weight",
    "input_blocks.0.0.weight",
    "time_embed.0.weight",
    "task_embedding",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.decoder.conv_in.weight",
    "encoder.conv_in.weight",
    "decoder.conv_in.weight",
    "decoder.conv_out.weight",
    "text_model.embeddings.token_embedding.weight",
    "token_embedding.weight",
    "positional_embedding",
    "cond_stage_model.model.token_embedding.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_b",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lokr_w1",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lokr_w2_b",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.oft_R.weight",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
    "emb_params",
    "clip_l",
    "clip_g",
    "conv_first.weight",
    "body.0.rdb1.conv1.weight",
    "edm_mean",
    "v_pred",
]
SHAPE = st.lists(st.sampled_from([0, 1, 2, 4, 9, 320, 768, 1024, 1280, 2048]), max_size=5).map(tuple)
SHAPE = SHAPE.filter(lambda shape: math.prod(shape) < 2**36)
KINDS, BASES = set(Kind.__args__), {*Base.__args__, None}  # type: ignore[attr-defined]


@given(shapes=st.dictionaries(st.sampled_from(PIECES), SHAPE, min_size=1, max_size=10))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_of_every_kind_in_any_shape_never_raise(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    report = inspect_file(sparse_files.write(tmp_path / "any.safetensors", shapes))
    assert report.kind in KINDS
    assert report.base in BASES
    assert report.reason
    assert report.kind != "unknown" or report.base is None


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_reads_like_a_pickles_beginning(tmp_path: Path, length: int) -> None:
    """Bytes 80 02 begin a pickle, and a header of 640 bytes."""
    padding = length - len(json.dumps(WORDS | {"__metadata__": {"a": ""}}))
    file = raw(tmp_path / "one.safetensors", WORDS | {"__metadata__": {"a": "b" * padding}})
    assert file.read_bytes()[:2] == bytes((0x80, length >> 8))
    assert read_header(file).tensors.keys() == {"emb_params"}
