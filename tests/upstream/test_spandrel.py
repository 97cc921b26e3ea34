"""What `pipelines/spandrel_compat.py` leans on: what spandrel imports of torchvision, and what its models tell."""

from __future__ import annotations

import ast
from pathlib import Path

from pipelines.spandrel_compat import _FUNCTIONS, esrgan, load_spandrel, read_upscaler


def test_two_architectures_that_enlarge_nothing_import_torchvision() -> None:
    folder = Path(load_spandrel().__file__).parent
    found: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchvision"):
                assert node.module == "torchvision.transforms.functional"
                architecture = path.relative_to(folder / "architectures").parts[0]
                found.setdefault(architecture, set()).update(alias.name for alias in node.names)
            assert not (isinstance(node, ast.Import) and any("torchvision" in alias.name for alias in node.names))
    assert found.keys() == {"LaMa", "RestoreFormer"}
    assert set().union(*found.values()) <= set(_FUNCTIONS)


def test_a_descriptor_tells_what_a_tile_needs() -> None:
    read = read_upscaler(esrgan()(in_nc=12, num_filters=4, num_blocks=1, scale=4, shuffle_factor=2).state_dict())
    assert (read.purpose, read.scale, read.input_channels, read.output_channels) == ("SR", 2, 3, 3)
    assert (read.size_requirements.multiple_of, read.tiling.name, read.supports_half) == (4, "SUPPORTED", True)
    assert {tiling.name for tiling in type(read.tiling)} == {"SUPPORTED", "DISCOURAGED", "INTERNAL"}
