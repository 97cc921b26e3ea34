"""What the text encoders, and LoRAs on them, assume of transformers' CLIP."""

from __future__ import annotations

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CONFIG = CLIPTextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=6,
    bos_token_id=0,
    eos_token_id=1,
)
TOKENS = torch.tensor([[0, 5, 1]])


def test_the_state_before_the_last_layer_is_the_last_but_one() -> None:
    model = CLIPTextModel(CONFIG).eval()
    with torch.inference_mode():
        output = model(TOKENS, output_hidden_states=True)
    assert len(output.hidden_states) == CONFIG.num_hidden_layers + 1
    assert not torch.equal(output.hidden_states[-2], output.last_hidden_state)


def test_only_a_model_with_projection_has_text_embeds() -> None:
    with torch.inference_mode():
        assert CLIPTextModelWithProjection(CONFIG).eval()(TOKENS).text_embeds.shape == (1, 6)
        assert getattr(CLIPTextModel(CONFIG).eval()(TOKENS), "text_embeds", None) is None


def test_clip_takes_no_attention_mask_unless_its_config_says_so() -> None:
    assert not getattr(CONFIG, "use_attention_mask", False)


def test_module_names_differ_by_the_level_text_model_alone() -> None:
    """`adapters/module_names.py` knows a text encoder's modules with and without it."""
    plain = {name.removeprefix("text_model.") for name, _ in CLIPTextModel(CONFIG).named_modules()}
    projected = {name.removeprefix("text_model.") for name, _ in CLIPTextModelWithProjection(CONFIG).named_modules()}
    assert {name for name in plain if name.startswith("encoder.layers.0")} == {
        name for name in projected if name.startswith("encoder.layers.0")
    }
