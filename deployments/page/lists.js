// Controls that contain others: LoRAs with weights, an object of fields, a list of objects.

import { button, fresh, make } from "./dom.js";
import { ADD } from "./layout.js";

/** LoRAs by name, each with a weight. `about(name)` returns a LoRA's trigger words. */
export function loras(spec, about) {
  const rows = make("div", { className: "rows" });
  const select = make("select", { id: fresh("loras") });
  const label = make("label", { htmlFor: select.id }, "Add a LoRA");
  const element = make("div", { className: "field" }, label, select, rows);
  select.onchange = () => {
    if (select.value) add(select.value, 1).querySelector("input").focus();
    select.value = "";
  };

  function add(name, weight) {
    [...rows.children].find((row) => row.dataset.name === name)?.remove();
    const input = make("input", { type: "number", step: "any", id: fresh("lora") });
    const range = make("input", { type: "range", min: -1, max: 2, step: 0.05 });
    range.setAttribute("aria-label", `Weight of ${name}, slider`);
    input.setAttribute("aria-label", `Weight of ${name}`);
    // A plan may have one weight for each part of the model; such weights are kept unchanged.
    const parts = typeof weight === "object" ? weight : null;
    if (parts) input.placeholder = Object.values(parts).join(" / ");
    else input.value = range.value = weight;
    range.oninput = () => (input.value = range.value);
    input.oninput = () => (range.value = input.value);
    const trigger = about(name);
    const row = make(
      "div",
      { className: "field slider" },
      make("span", { className: "label" }, name),
      input,
      range,
      button("Remove", () => row.remove(), { ariaLabel: `Remove ${name}`, className: "quiet" }),
      trigger ? make("p", { className: "hint" }, `Trigger words for the prompt: ${trigger}`) : null,
    );
    row.dataset.name = name;
    row.weight = () => (input.value === "" ? (parts ?? 1) : Number(input.value));
    rows.append(row);
    return row;
  }

  return {
    element,
    fields: [spec.name],
    input: select,
    read() {
      const weights = Object.fromEntries([...rows.children].map((row) => [row.dataset.name, row.weight()]));
      return rows.children.length ? { [spec.name]: weights } : {};
    },
    write(fields) {
      rows.replaceChildren();
      for (const [name, weight] of Object.entries(fields[spec.name] ?? {})) add(name, weight);
    },
    adapt(model) {
      const names = model.loras.map((name) => make("option", {}, name));
      select.replaceChildren(make("option", { value: "" }, "Choose…"), ...names);
      select.value = "";
    },
  };
}

/** An object of fields, which is sent if its switch is on. `inside()` creates the controls of its fields. */
export function group(spec, inside) {
  const controls = inside();
  const input = make("input", { type: "checkbox", id: fresh(spec.name) });
  const named = { className: "nested", hidden: true, role: "group", ariaLabel: spec.label };
  const fields = make("div", named, controls.map(({ element }) => element));
  const title = make("label", { className: "switch" }, input, spec.label);
  const follow = () => (fields.hidden = !input.checked);
  input.onchange = follow;
  const hint = spec.hint ? make("p", { className: "hint" }, spec.hint) : null;
  return {
    element: make("div", { className: "field" }, title, hint, fields),
    fields: [spec.name],
    input,
    read: () => (input.checked ? { [spec.name]: Object.assign({}, ...controls.map((one) => one.read())) } : {}),
    write(values) {
      input.checked = Boolean(values[spec.name]);
      for (const one of controls) one.write(values[spec.name] ?? {});
      follow();
    },
    adapt: (model) => controls.forEach((one) => one.adapt?.(model)),
  };
}

/** A list of such objects. */
export function list(spec, inside) {
  const entries = [];
  const rows = make("div", { className: "rows" });
  let model = null;
  const more = button(ADD[spec.name] ?? "Add", () => add().element.querySelector("input, select").focus());
  more.id = fresh(spec.name);
  const hint = spec.hint ? make("p", { className: "hint" }, spec.hint) : null;

  function add(values = {}) {
    const controls = inside();
    const element = make("fieldset", { className: "nested" }, controls.map((one) => one.element));
    const entry = { controls, element };
    element.append(
      button("Remove", () => {
        entries.splice(entries.indexOf(entry), 1);
        element.remove();
      }),
    );
    for (const one of controls) {
      if (model) one.adapt?.(model);
      one.write(values);
    }
    entries.push(entry);
    rows.append(element);
    return entry;
  }

  return {
    element: make("div", { className: "field" }, rows, more, hint),
    fields: [spec.name],
    input: more,
    /** Show the first entry. */
    begin: () => entries.length || add(),
    /** Put a picture into the first entry that has none. */
    offer(blob) {
      const free = entries.find(({ controls }) => controls.some((one) => one.set && !Object.keys(one.read()).length));
      (free ?? add()).controls.find((one) => one.set)?.set(blob);
    },
    read() {
      const values = entries.map(({ controls }) => Object.assign({}, ...controls.map((one) => one.read())));
      return values.length ? { [spec.name]: values } : {};
    },
    write(fields) {
      entries.length = 0;
      rows.replaceChildren();
      for (const values of fields[spec.name] ?? []) add(values);
    },
    adapt(next) {
      model = next;
      for (const { controls } of entries) controls.forEach((one) => one.adapt?.(model));
    },
  };
}
