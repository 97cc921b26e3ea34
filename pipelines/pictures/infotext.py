"""A1111's infotext: the settings of a picture as people copy them from tool to tool.

Its form as AUTOMATIC1111 1.10 and Forge write it: the prompt, a line `Negative prompt: ...`, a line of `name: value`
pairs.
"""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from pydantic import ValidationError

from config.upscalers import A1111_NAMES, METHOD_ALIASES
from pipelines.control_plan import ControlUse
from pipelines.enlargement import HiresParams
from pipelines.plan import Emphasis, GenerationPlan, LoraUse, StagePlan, TextReading
from pipelines.sampling.a1111 import our_sampler, their_sampler
from pipelines.upscale import UpscalePlan

_NEGATIVE = "Negative prompt: "
_PAIR = re.compile(r'(\w[\w \-/]{0,60}?): ("(?:\\.|[^\\"])*"|[^,]*)(?:, |,?$)')
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_LONGEST = 100_000
"""Most characters of a line of pairs; a longer line is not one."""
_NUMBERS = {
    "CFG scale": "cfg_scale",
    "Denoising strength": "strength",
    "Mask blur": "mask_blur",
    "Eta DDIM": "eta",
    "CFG Rescale phi": "guidance_rescale",
    "Guidance start": "guidance_start",
    "Guidance end": "guidance_end",
}
"""Name -> field. A1111's own, that of its CFG rescale extension, and for the window ours: it has one of steps alone."""
_WHOLE_NUMBERS = {"Steps": "steps", "Seed": "seed", "Masked area padding": "inpaint_padding"}
_FILLS = {"noise": "latent noise", "surroundings": "fill", "nothing": "latent nothing"}
"""What a masked part begins from, where it is not the original -> A1111's name."""
_WORDS = {
    ("Inpaint area", "Only masked"): ("inpaint_area", "masked"),
    **{("Masked content", theirs): ("inpaint_fill", ours) for ours, theirs in _FILLS.items()},
    ("Long prompt", "cut"): ("long_prompt", "cut"),
}
"""Pair -> field and value. A1111 cuts no prompt, so that the last one is ours."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def infotext(plan: GenerationPlan | UpscalePlan) -> str:
    """A plan's settings for A1111's tools, which read brackets as weights: those of a plain prompt are escaped."""
    if isinstance(plan, UpscalePlan):
        return _enlarged(plan)
    first = plan.stages[0]
    sampler, schedule = their_sampler(first.sampler)
    pairs: dict[str, object] = {
        "Steps": first.schedule.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": first.guidance_scale,
        "Seed": plan.seed,
        "Size": f"{plan.width}x{plan.height}",
        "Model": plan.model,
    }
    if first.schedule.strength is not None:
        pairs["Denoising strength"] = first.schedule.strength
    pairs |= _mask_pairs(first) | _guidance_pairs(first)
    if second := plan.second_pass:
        pairs |= _hires_pairs(second)
    if plan.refined:
        refiner = plan.stages[-1]
        pairs |= {"Refiner": refiner.component, "Refiner switch at": refiner.schedule.start}
    pairs |= {f"ControlNet {i}": _control(use) for i, use in enumerate(first.controls)}
    reading = first.text.reading
    if reading.clip_skip > 1:
        pairs["Clip skip"] = reading.clip_skip
    if reading.emphasis != "Original":
        pairs["Emphasis"] = reading.emphasis
    if reading.long_prompt != "chunk":
        pairs["Long prompt"] = reading.long_prompt
    pairs["Version"] = "sdgraph"
    loras = "".join(f" <lora:{use.name}:{_lora_weights(use)}>" for use in first.loras)
    lines = [_weighted(first.text.prompts[0], reading) + loras]
    if first.text.negative_prompts and first.text.negative_prompts[0]:
        lines.append(_NEGATIVE + _weighted(first.text.negative_prompts[0], reading))
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items()))
    return _CONTROL.sub(" ", "\n".join(lines))


def _enlarged(plan: UpscalePlan) -> str:
    """What a sent picture said of its making, and how it was enlarged, as A1111's extras add it."""
    upscaler = A1111_NAMES.get(plan.upscaler, plan.upscaler)
    added = f"Postprocess upscale by: {plan.scale:g}, Postprocess upscaler: {_quoted(upscaler)}"
    told = (plan.source_infotext or "").strip()
    return f"{told}, {added}" if parse_infotext(told) else f"{told}\n{added}".strip()


def _mask_pairs(stage: StagePlan) -> dict[str, object]:
    """How a part was repainted. The blur is told even if it is none: that there was a mask nothing else would say."""
    inpaint = stage.inpaint
    if inpaint is None:
        return {}
    pairs: dict[str, object] = {"Mask blur": f"{inpaint.blur:g}"}
    if inpaint.area == "masked":
        pairs |= {"Inpaint area": "Only masked", "Masked area padding": inpaint.padding}
    if inpaint.fill in _FILLS:
        pairs["Masked content"] = _FILLS[inpaint.fill]
    return pairs


def _guidance_pairs(stage: StagePlan) -> dict[str, object]:
    """What differs from guidance that is neither scaled back nor has a window, and from no eta."""
    told = stage.model_dump(exclude_defaults=True, include={"guidance_rescale", "guidance_start", "guidance_end"})
    told |= stage.schedule.model_dump(exclude_defaults=True, include={"eta"})
    return {name: told[field] for name, field in _NUMBERS.items() if field in told}


def _hires_pairs(stage: StagePlan) -> dict[str, object]:
    """A second pass as A1111 names it; there `Denoising strength` is its own, for it has none after img2img."""
    assert stage.enlargement is not None
    upscaler = stage.enlargement.upscaler
    return {
        "Denoising strength": stage.schedule.strength,
        "Hires upscale": stage.enlargement.scale,
        "Hires steps": stage.schedule.steps_run,
        "Hires upscaler": A1111_NAMES.get(upscaler, upscaler),
    }


def _hires_fields(pairs: dict[str, str]) -> dict[str, Any] | None:
    """`hires` of a request, None where an infotext has no second pass or one that is none here."""
    names = {"scale": "Hires upscale", "steps": "Hires steps", "strength": "Denoising strength"}
    if names["scale"] not in pairs:
        return None
    told = {field: pairs[name] for field, name in names.items() if name in pairs}
    upscaler = pairs.get("Hires upscaler", "latent")
    ours = {alias.casefold(): name for alias, name in METHOD_ALIASES.items()}.get(upscaler.casefold(), upscaler)
    try:
        return HiresParams.model_validate(told | {"upscaler": ours}).model_dump(exclude_none=True)
    except ValidationError:
        return None


def _control(use: ControlUse) -> str:
    """A control as the ControlNet extension of A1111 writes it."""
    module, mode = use.name if use.preprocess else "none", "ControlNet is more important" if use.guess else "Balanced"
    said = {"Module": module, "Model": use.component, "Weight": f"{use.weight:g}"}
    said |= {"Guidance Start": f"{use.start:g}", "Guidance End": f"{use.end:g}", "Control Mode": mode}
    return ", ".join(f"{name}: {value}" for name, value in said.items())


def _lora_weights(use: LoraUse) -> str:
    """A LoRA's weight, or the first text encoder's and the UNet's: A1111 has no more."""
    return f"{use.weight:g}" if use.text_encoder is None else f"{use.text_encoder:g}:{use.weight:g}"


def _weighted(text: str, reading: TextReading) -> str:
    """A text as A1111 must see it to read it as it was read here."""
    return text if reading.syntax == "weighted" else re.sub(r"[()\[\]\\]", r"\\\g<0>", text)


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def parse_infotext(text: str) -> tuple[str, str | None, dict[str, str]] | None:
    """Prompt, negative prompt and the pairs of an infotext, as they stand there; None if it is none."""
    *lines, last = text.strip().split("\n")
    pairs = {name: _unquoted(value) for name, value in _PAIR.findall(last)} if len(last) <= _LONGEST else {}
    if "Steps" not in pairs:
        return None
    begins = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[begins:]).removeprefix(_NEGATIVE) if begins < len(lines) else None
    return "\n".join(lines[:begins]), negative, pairs


def _unquoted(value: str) -> str:
    if not value.startswith('"'):
        return value.strip()
    try:
        return str(json.loads(value)).encode("utf-8", "replace").decode()  # lone surrogates cannot be sent
    except ValueError:
        return value


def request_fields(prompt: str, negative: str | None, pairs: dict[str, str]) -> dict[str, Any]:
    """Fields of a request, by the names of our API, that an infotext sets. Models are left out: servers differ."""
    fields: dict[str, Any] = {"prompt": prompt, "prompt_syntax": "weighted"}
    if negative is not None:
        fields["negative_prompt"] = negative
    sampler = our_sampler(pairs.get("Sampler", ""), pairs.get("Schedule type", "Automatic"))
    if sampler is not None:
        fields["sampler"] = sampler
    if pairs.get("Emphasis") in get_args(Emphasis):
        fields["emphasis"] = pairs["Emphasis"]
    if re.fullmatch(r"[1-9]|1[0-2]", pairs.get("Clip skip", "")):
        fields["clip_skip"] = int(pairs["Clip skip"])
    size = _SIZE.fullmatch(pairs.get("Size", ""))
    if size is not None:
        fields |= {"width": int(size[1]), "height": int(size[2])}
    numbers = dict(_NUMBERS)
    if "Hires upscale" in pairs:
        del numbers["Denoising strength"]
    if hires := _hires_fields(pairs):
        fields["hires"] = hires
    for name, field in _WHOLE_NUMBERS.items():
        if re.fullmatch(r"\d{1,10}", value := pairs.get(name, "")):
            fields[field] = int(value)
    for name, field in numbers.items():
        if re.fullmatch(r"\d{1,4}(\.\d{1,20})?", value := pairs.get(name, "")):
            fields[field] = float(value)
    for (name, word), (field, said) in _WORDS.items():
        if pairs.get(name, "").casefold() == word.casefold():
            fields[field] = said
    return fields
