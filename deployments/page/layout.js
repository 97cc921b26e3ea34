// The place and the label of each field of the request. Types, bounds and hints come from the OpenAPI document. A field
// that is not named here appears under "More".

/** Fields that are always visible. */
export const FIRST = ["prompt", "negative_prompt", "model_name"];

/** Fields that are visible, except on narrow screens, where they are collapsed. */
export const USUAL = ["style_preset", "width", "steps", "cfg_scale", "seed"];

/** The other fields, in groups that can be opened. */
export const GROUPS = [
  ["Start from a picture", ["image", "strength", "mask_blur", "inpaint_area", "inpaint_padding", "inpaint_fill"]],
  ["Steer by a photo", ["controlnets", "controlnet_name", "controlnet_image", "controlnet_preprocess"]],
  ["LoRAs", ["loras"]],
  ["Sampling", ["sampler", "guidance_rescale", "guidance_start", "guidance_end", "eta"]],
  ["Second pass", ["hires", "enable_refiner"]],
  [
    "Reading the prompt",
    ["prompt_2", "negative_prompt_2", "prompt_syntax", "emphasis", "long_prompt", "clip_skip"],
  ],
  ["File and server", ["output_format", "preview", "backend"]],
];

/** Fields that another field's control writes too, and `stream`, which this page always sends. */
export const ELSEWHERE = { height: "width", mask_image: "image", stream: null };

/** Labels of fields whose own name is not clear enough. */
export const LABELS = {
  model_name: "Model",
  style_preset: "Style",
  cfg_scale: "Guidance",
  image: "Start picture",
  strength: "How much is redrawn",
  controlnet_name: "Control",
  controlnet_image: "Photo",
  controlnet_preprocess: "Make a control map of the photo",
  controlnets: "Controls",
  loras: "LoRAs",
  hires: "Draw larger in a second pass",
  enable_refiner: "Use the refiner",
  preview: "Show the picture in the making",
  output_format: "File format",
  preprocess: "Make a control map of the photo",
};

/** The text of the button that adds an entry to a list. */
export const ADD = { controlnets: "Add a control" };

export const PLACEHOLDERS = {
  prompt: "a sailboat on a blue background",
  negative_prompt: "what the picture should not show",
  seed: "random",
};

/** Sliders beside numbers: minimum, maximum, step. The number itself may be any that the server accepts. */
export const SLIDERS = {
  steps: [1, 60, 1],
  cfg_scale: [0, 20, 0.5],
  strength: [0, 1, 0.05],
  weight: [0, 2, 0.05],
  start: [0, 1, 0.05],
  end: [0, 1, 0.05],
};

/** Switches that are on by default. Previews are this page's own default, so it always sends that field. */
export const ON = new Set(["controlnet_preprocess", "preprocess", "preview"]);

/** Whether a model has a field at all. */
const SDXL = (model) => model.family === "sdxl";
export const HAS = {
  prompt_2: SDXL,
  negative_prompt_2: SDXL,
  enable_refiner: (model) => model.refiner,
  loras: (model) => model.loras.length > 0,
  controlnets: (model) => model.controlnets.length > 0,
  controlnet_name: (model) => model.controlnets.length > 0,
  controlnet_image: (model) => model.controlnets.length > 0,
  controlnet_preprocess: (model) => model.controlnets.length > 0,
};
