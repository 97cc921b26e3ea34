"""Tensors by plain reads: as safetensors' own reader has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.weights.tensor_file import DTYPES, TensorFile


def test_every_number_format_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 2, (3, 16), generator=generator, dtype=torch.uint8)
    tensors = {name: noise.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"number": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"a": "b"})
    with TensorFile(path) as file:
        read = {name: file.read(name) for name in file.tensors}
        assert file.metadata == {"a": "b"}
    theirs = load_file(path)
    assert read.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            read[name].view(torch.uint8) if tensor.ndim else read[name],
            tensor.view(torch.uint8) if tensor.ndim else tensor,
        ), name


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    with TensorFile(path) as file:
        with path.open("r+b") as shorter:
            shorter.truncate(100)
        with pytest.raises(ValueError, match="it was truncated while it was read, in tensor a"):
            file.read("a")
