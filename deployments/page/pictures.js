// The controls for pictures of a request, which can be chosen, dropped or pasted. Only the start picture has a mask.

import { button, fresh, make, show } from "./dom.js";
import { paint } from "./mask.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** The first picture file of a drop or paste event. */
export function pictureIn(transfer) {
  return [...transfer.files].find(({ type }) => KINDS.includes(type)) ?? null;
}

/**
 * The control for a picture of a request.
 * @param changed called after each change by the user
 */
export function picture(spec, changed = () => {}) {
  let blob = null;
  const input = make("input", { type: "file", accept: KINDS.join(), id: fresh(spec.name), className: "unseen" });
  const image = make("img", { alt: spec.label });
  const words = make("span", {}, "Choose, drop or paste a picture");
  const well = make("label", { className: "well", htmlFor: input.id }, words, image);
  const remove = button("Remove", () => set(null), { hidden: true });
  const tools = make("div", { className: "row" }, remove);
  const hint = spec.hint ? make("p", { className: "hint" }, spec.hint) : null;
  const title = make("span", { className: "label", id: `${input.id}-title` }, spec.label);
  input.setAttribute("aria-labelledby", title.id);
  const element = make("div", { className: "field picture" }, title, input, well, tools, hint);

  function set(next) {
    blob = next;
    input.value = "";
    well.classList.toggle("full", blob !== null);
    remove.hidden = blob === null;
    if (blob) show(image, blob);
    changed(blob);
  }
  input.onchange = () => input.files[0] && set(input.files[0]);
  well.ondragover = (event) => {
    event.preventDefault();
    event.stopPropagation();
  };
  well.ondrop = (event) => {
    event.preventDefault();
    event.stopPropagation();
    document.body.classList.remove("dragging");
    const found = pictureIn(event.dataTransfer);
    if (found) set(found);
  };
  return {
    element,
    tools,
    well,
    fields: [spec.name],
    input,
    read: () => (blob ? { [spec.name]: blob } : {}),
    write: (fields) => set(fields[spec.name] instanceof Blob ? fields[spec.name] : null),
    set,
  };
}

/**
 * The control for the start picture, and for the mask of the part that is repainted.
 * @param follow called with whether there is a picture and whether there is a mask: other fields depend on them
 */
export function startPicture(spec, follow) {
  let mask = null;
  const shade = make("img", { alt: "", className: "shade" });
  const image = picture(spec, () => setMask(null));
  const change = button("Paint a mask", async () => setMask(await paint(image.read()[spec.name], mask)));
  const drop = button("Remove mask", () => setMask(null));
  image.well.append(shade);
  image.tools.append(change, drop);

  function setMask(next) {
    mask = next;
    const full = Boolean(image.read()[spec.name]);
    change.hidden = !full;
    drop.hidden = shade.hidden = mask === null;
    change.textContent = mask ? "Change mask" : "Paint a mask";
    if (mask) show(shade, mask);
    follow(full, mask !== null);
  }
  setMask(null);
  return {
    ...image,
    fields: [spec.name, "mask_image"],
    read: () => ({ ...image.read(), ...(mask ? { mask_image: mask } : {}) }),
    write(fields) {
      image.write(fields);
      setMask(fields.mask_image instanceof Blob ? fields.mask_image : null);
    },
  };
}
