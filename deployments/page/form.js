// The request as a form with every field of the OpenAPI document that the chosen model has.

import { choice, described, number, size, text, toggle } from "./controls.js";
import { find, fresh, make } from "./dom.js";
import { ELSEWHERE, FIRST, GROUPS, HAS, USUAL } from "./layout.js";
import { group, list, loras } from "./lists.js";
import { picture, startPicture } from "./pictures.js";

export class Form {
  #offers;
  #specs;
  #controls = new Map();
  #groups = [];

  /** @param offers what `offers()` in main.js fetched */
  constructor(offers) {
    this.#offers = offers;
    const { properties } = offers.schemas.GenerationRequest;
    const specs = Object.entries(properties).map(([name, schema]) => described(name, schema, offers.schemas));
    this.#specs = new Map(specs.map((spec) => [spec.name, spec]));
    // Where the server takes a list of controls, the fields for a single control are left out.
    if (this.#specs.has("controlnets")) {
      for (const name of ["name", "image", "preprocess"]) this.#specs.delete(`controlnet_${name}`);
    }
    find("first").replaceChildren(...this.#add(FIRST, { quiet: true }));
    find("usual").replaceChildren(...this.#add(USUAL, { quiet: true }));
    const named = new Set([...FIRST, ...USUAL, ...GROUPS.flatMap(([, names]) => names), ...Object.keys(ELSEWHERE)]);
    const unnamed = [...this.#specs.keys()].filter((name) => !named.has(name));
    const groups = [...GROUPS, ["More", unnamed]].map(([title, names]) => this.#group(title, names));
    find("groups").replaceChildren(...groups);
    this.#insertEmbeddings();
    this.get("model_name").input.addEventListener("change", () => {
      this.#adapt();
      if (this.model.requires_controlnet) this.#steer();
    });
    this.#adapt();
  }

  get = (name) => this.#controls.get(name);

  get model() {
    const chosen = this.get("model_name").input.value;
    return this.#offers.models.find(({ id }) => id === chosen) ?? this.#offers.models[0];
  }

  /** The fields that differ from the server's defaults. Pictures are blobs. */
  read() {
    const shown = [...new Set(this.#controls.values())].filter(({ element }) => !element.hidden);
    return Object.assign({}, ...shown.map((control) => control.read()));
  }

  /** Show a whole request, and clear all other fields. The model stays if the request names none. */
  write(fields) {
    fields = { model_name: this.model.id, ...fields };
    if (this.get("controlnets") && fields.controlnet_name && !fields.controlnets) {
      const { controlnet_name: name, controlnet_image: image, controlnet_preprocess: preprocess } = fields;
      fields.controlnets = [{ name, image, preprocess }];
    }
    this.get("model_name").write(fields);
    this.#adapt();
    for (const control of new Set(this.#controls.values())) control.write(fields);
    this.#adapt();
    this.count();
  }

  /** Change some fields and keep the others. */
  change(fields) {
    this.write({ ...this.read(), ...fields });
  }

  /** Take a start picture or a control photo. */
  take(name, blob) {
    const control = name === "image" ? this.get("image") : (this.get("controlnets") ?? this.get("controlnet_image"));
    (control.offer ?? control.set)(blob);
    this.#open(control.element);
    control.element.scrollIntoView({ block: "center" });
    this.count();
  }

  get upscalers() {
    return this.#offers.upscalers;
  }

  get steers() {
    return this.model.controlnets.length > 0;
  }

  /** Show an error beside its field, and move the focus there. */
  mark(name, message) {
    const control = this.get(name.split(".")[0]);
    if (control) this.markInput(control.inputs?.[name] ?? control.input, message);
  }

  markInput(input, message) {
    const note = make("p", { className: "wrong", id: fresh("wrong") }, message);
    input.closest(".field").append(note);
    input.setAttribute("aria-invalid", "true");
    input.setAttribute("aria-errormessage", note.id);
    this.#open(input);
    input.focus();
  }

  /** The first visible input whose number is invalid; its group may be closed. */
  get broken() {
    return [...find("form").querySelectorAll("input:invalid")].find((input) => !input.closest("[hidden]"));
  }

  unmark() {
    for (const note of document.querySelectorAll(".wrong")) note.remove();
    for (const input of document.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  /** Show beside each group how many of its fields are set. */
  count() {
    for (const { controls, badge } of this.#groups) {
      const set = controls.filter(({ element, read }) => !element.hidden && Object.keys(read()).length).length;
      badge.textContent = set ? `${set} set` : "";
    }
  }

  /** Open the control photo's group if the chosen model requires one. */
  #steer() {
    const control = this.get("controlnets") ?? this.get("controlnet_name");
    control.begin?.();
    this.#open(control.element);
  }

  #open(element) {
    for (let at = element; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  }

  /** Adapt the form to the model: its fields, its defaults, its names. */
  #adapt() {
    const { model } = this;
    for (const control of new Set(this.#controls.values())) control.adapt?.(model);
    for (const [name, has] of Object.entries(HAS)) {
      const control = this.get(name);
      if (control) control.element.hidden = !has(model);
    }
    for (const { controls, details } of this.#groups) details.hidden = controls.every(({ element }) => element.hidden);
  }

  #group(title, names) {
    const elements = this.#add(names);
    const badge = make("small");
    const details = make("details", { className: "group" }, make("summary", {}, title, " ", badge), elements);
    const controls = names.map(this.get).filter(Boolean);
    this.#groups.push({ controls, badge, details });
    return details;
  }

  /** Create the controls of some fields, except those that the server does not have. */
  #add(names, more = {}) {
    const specs = names.map((name) => this.#specs.get(name)).filter(Boolean);
    const controls = specs.map((spec) => this.#control({ ...spec, ...more }));
    for (const control of controls) for (const name of control.fields) this.#controls.set(name, control);
    return controls.map(({ element }) => element);
  }

  #control(spec) {
    const { models, samplers, styles, upscalers, loras: known } = this.#offers;
    const inside = () => spec.inner.map((inner) => this.#control({ ...inner, nested: true }));
    switch (spec.name) {
      case "model_name":
        return choice({ ...spec, required: true }, () => models.map(({ id }) => id));
      case "style_preset":
        return choice(spec, () => styles, () => "None");
      case "sampler":
        return choice(spec, () => samplers, (model) => model.defaults.sampler);
      case "controlnet_name":
        return choice(spec, (model) => model.controlnets, () => "None");
      case "name": // of an entry of `controlnets`
        return choice({ ...spec, required: true, label: "Control" }, (model) => model.controlnets);
      case "upscaler": {
        const others = upscalers.map(({ name }) => name).filter((name) => name !== spec.standard);
        return choice(spec, () => others, () => spec.standard);
      }
      case "width":
        return size(spec, this.#specs.get("height"));
      case "loras":
        return loras(spec, (name) => known.find((lora) => lora.name === name)?.trigger);
      case "image":
        if (spec.nested) return picture({ ...spec, label: "Photo" });
        return startPicture({ ...spec, hint: "" }, this.#followStart);
    }
    if (spec.type === "array") return list(spec, inside);
    if (spec.type === "object") return group(spec, inside);
    if (spec.type === "boolean") return toggle(spec);
    if (spec.type === "number" || spec.type === "integer") return number(spec);
    if (spec.picture) return picture(spec);
    return spec.choices ? choice(spec) : text(spec);
  }

  /** Hide the fields that have no effect without a start picture or a mask until there is one. */
  #followStart = (full, masked) => {
    // The picture's control calls this while it is created, when later controls do not exist yet.
    queueMicrotask(() => {
      if (this.get("strength")) this.get("strength").element.hidden = !full;
      for (const name of ["mask_blur", "inpaint_area", "inpaint_padding", "inpaint_fill"]) {
        if (this.get(name)) this.get(name).element.hidden = !masked;
      }
    });
  };

  /** Offer textual inversions below the prompt, because they are used as words of the prompt. */
  #insertEmbeddings() {
    const prompt = this.get("prompt");
    const spec = { name: "embedding", label: "Insert an embedding" };
    const names = choice(spec, (model) => model.embeddings, () => "Choose…");
    names.input.onchange = () => {
      const { input } = prompt;
      input.setRangeText(` <${names.input.value}> `, input.selectionStart, input.selectionEnd, "end");
      names.input.value = "";
      input.focus();
    };
    prompt.element.append(names.element);
    prompt.adapt = (model) => {
      names.adapt(model);
      names.element.hidden = !model.embeddings.length;
    };
  }
}
