// Controls of single fields. A control is
//   {element, fields, input, read(), write(fields), adapt(model)}
// `read` returns the fields that differ from the server's defaults. `write` takes the fields from a whole request and
// clears those that are not in it. `adapt` changes the control for the chosen model.

import { fresh, make } from "./dom.js";
import { LABELS, ON, PLACEHOLDERS, SLIDERS } from "./layout.js";

/** The description of a field in the OpenAPI document, with references resolved. */
export function described(name, property, schemas) {
  const resolve = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").pop()] : schema);
  const kinds = (property.anyOf ?? property.oneOf ?? [property]).map(resolve).filter(({ type }) => type !== "null");
  const kind = { ...kinds[0] };
  const nested = (properties) =>
    Object.entries(properties ?? {}).map(([inner, schema]) => described(inner, schema, schemas));
  return {
    name,
    label: LABELS[name] ?? sentence(name),
    hint: (property.description ?? kind.description ?? "").replaceAll("`", ""),
    type: kind.type,
    picture: kind.type === "string" && /(^|_)image$/.test(name),
    long: kind.type === "string" && kind.maxLength >= 2000,
    choices: kind.enum ?? (kind.type === "string" ? (property.examples ?? kind.examples) : undefined),
    minimum: kind.minimum ?? kind.exclusiveMinimum,
    maximum: kind.maximum ?? kind.exclusiveMaximum - (kind.type === "integer" ? 1 : 0),
    inner: kind.type === "array" ? nested(resolve(kind.items)?.properties) : nested(kind.properties),
    standard: standardOf(property.description ?? "") ?? property.default ?? "",
  };
}

/** The number that a description calls the default. */
function standardOf(description) {
  const found = description.match(/default (-?[\d.]*\d)|(-?[\d.]*\d) \(default\)/i);
  return found?.[1] ?? found?.[2];
}

const sentence = (name) => (name[0].toUpperCase() + name.slice(1)).replaceAll("_", " ");

/** A label, a control and its hint, one below the other. */
export function labelled(spec, input, ...beside) {
  input.id ||= fresh(spec.name);
  const label = make("label", { htmlFor: input.id }, spec.label);
  const hint = spec.hint && !spec.quiet ? make("p", { className: "hint", id: `${input.id}-hint` }, spec.hint) : null;
  if (hint) input.setAttribute("aria-describedby", hint.id);
  return make("div", { className: "field" }, label, input, ...beside, hint);
}

/** A text, of one line or several. */
export function text(spec) {
  const properties = { placeholder: PLACEHOLDERS[spec.name] ?? spec.standard, maxLength: spec.long ? 20000 : 200 };
  const tag = spec.long ? "textarea" : "input";
  const input = make(tag, spec.long ? { ...properties, rows: spec.name === "prompt" ? 3 : 1 } : properties);
  return {
    element: labelled(spec, input),
    fields: [spec.name],
    input,
    read: () => (input.value.trim() ? { [spec.name]: input.value.trim() } : {}),
    write: (fields) => (input.value = fields[spec.name] ?? ""),
  };
}

/** A number, empty for the default of the server or the model; some have a slider. */
export function number(spec) {
  const step = spec.type === "integer" ? 1 : "any";
  const input = make("input", { type: "number", min: spec.minimum, max: spec.maximum, step, inputMode: "decimal" });
  const standard = (value) => (input.placeholder = PLACEHOLDERS[spec.name] ?? value);
  standard(spec.standard);
  const slide = SLIDERS[spec.name];
  const range = slide && make("input", { type: "range", min: slide[0], max: slide[1], step: slide[2] });
  const follow = () => range && (range.value = input.value || input.placeholder || slide[0]);
  if (range) {
    range.setAttribute("aria-label", `${spec.label}, slider`);
    range.oninput = () => (input.value = range.value);
    input.oninput = follow;
  }
  follow();
  const element = labelled(spec, input, range);
  if (range) element.classList.add("slider");
  return {
    element,
    fields: [spec.name],
    input,
    read: () => (input.value === "" ? {} : { [spec.name]: Number(input.value) }),
    write(fields) {
      input.value = fields[spec.name] ?? "";
      follow();
    },
    adapt(model) {
      if (!spec.nested) standard(model.defaults[spec.name] ?? spec.standard);
      follow();
    },
  };
}

/**
 * One of several names. The first entry of the list stands for the server's default.
 * @param options `(model) => names`, asked again for each model
 * @param standard `(model) => name` of the default
 */
export function choice(spec, options = () => spec.choices.slice(1), standard = () => spec.choices[0]) {
  const select = make("select");
  function adapt(model) {
    const chosen = select.value;
    const first = spec.required ? [] : [make("option", { value: "" }, standard(model))];
    select.replaceChildren(...first, ...options(model).map((name) => make("option", { value: name }, name)));
    pick(chosen);
  }
  /** A name that the server does not offer stays visible, so that the server's error can name it. */
  function pick(name) {
    if (name && ![...select.options].some((option) => option.value === name)) select.append(make("option", {}, name));
    select.value = name ?? "";
    if (select.selectedIndex < 0) select.selectedIndex = 0;
  }
  return {
    element: labelled(spec, select),
    fields: [spec.name],
    input: select,
    read: () => (select.value ? { [spec.name]: select.value } : {}),
    write: (fields) => pick(fields[spec.name] ?? ""),
    adapt,
  };
}

/** A switch. */
export function toggle(spec) {
  const usual = ON.has(spec.name);
  const input = make("input", { type: "checkbox", checked: usual, id: fresh(spec.name) });
  return {
    element: make("div", { className: "field" }, make("label", { className: "switch" }, input, spec.label)),
    fields: [spec.name],
    input,
    read: () => (input.checked === usual ? {} : { [spec.name]: input.checked }),
    write: (fields) => (input.checked = fields[spec.name] ?? usual),
  };
}

/** Width and height: one of the sizes that the model draws best, or any other. */
export function size(width, height) {
  const sides = [number({ ...width, hint: "" }), number({ ...height, hint: "" })];
  const select = make("select");
  const own = make("div", { className: "row", hidden: true }, sides.map(({ element }) => element));
  const spec = { name: "size", label: "Size" };
  const [across, down] = sides.map(({ input }) => input);
  function follow() {
    own.hidden = select.value !== "own";
    if (own.hidden) [across.value, down.value] = select.value ? select.value.split("x") : ["", ""];
  }
  select.onchange = () => {
    const before = own.hidden;
    follow();
    if (before && !own.hidden && !across.value) [across.value, down.value] = [across.placeholder, down.placeholder];
  };
  return {
    element: make("div", {}, labelled(spec, select), own),
    fields: ["width", "height"],
    inputs: { width: across, height: down },
    input: select,
    read: () => Object.assign({}, ...sides.map((side) => side.read())),
    write(fields) {
      for (const side of sides) side.write(fields);
      const named = `${across.value}x${down.value}`;
      const known = [...select.options].some(({ value }) => value === named);
      select.value = known ? named : across.value || down.value ? "own" : "";
      follow();
    },
    adapt(model) {
      const { width: w, height: h } = model.defaults;
      for (const side of sides) side.adapt(model);
      const others = model.sizes.filter((other) => other !== `${w}x${h}`);
      const known = others.map((other) => [other, other.replace("x", " × ")]);
      const options = [["", `${w} × ${h}`], ...known, ["own", "Other…"]];
      const before = this.read();
      select.replaceChildren(...options.map(([value, name]) => make("option", { value }, name)));
      this.write(before);
    },
  };
}
