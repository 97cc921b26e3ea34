// Making elements, and the dialogs' common behaviour.

/** Create an element. Properties that the DOM lacks become attributes; children are nodes, text or null. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export const button = (text, onclick, properties = {}) =>
  make("button", { type: "button", onclick, ...properties }, text);

export const find = (id) => document.getElementById(id);

let made = 0;
/** An id that nothing else on the page has. */
export const fresh = (prefix) => `${prefix}-${(made += 1)}`;

/** An image element for a blob. Its URL is revoked when the image is decoded. */
export function imageOf(blob, alt, properties = {}) {
  const image = make("img", { alt, ...properties });
  show(image, blob);
  return image;
}

/** Show a blob in an image element, in place of what it shows now. */
export function show(image, blob) {
  const url = URL.createObjectURL(blob);
  image.onload = image.onerror = () => URL.revokeObjectURL(url);
  image.src = url;
}

/** Read a blob as base64. */
export async function base64Of(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

/** The blob of a base64 text. Its type follows from its first byte. */
export function blobOf(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const type = { 0xff: "image/jpeg", 0x89: "image/png", 0x52: "image/webp" }[bytes[0]] ?? "application/octet-stream";
  return new Blob([bytes], { type });
}

/** A copy of a JSON-like value, with each blob in it replaced by the result of `replace`. */
export async function withoutBlobs(value, replace, name = "") {
  if (value instanceof Blob) return replace(value, name);
  if (Array.isArray(value)) {
    return Promise.all(value.map((entry, index) => withoutBlobs(entry, replace, `${name}_${index + 1}`)));
  }
  if (value === null || typeof value !== "object") return value;
  const pairs = Object.entries(value).map(async ([key, entry]) => {
    return [key, await withoutBlobs(entry, replace, name ? `${name}_${key}` : key)];
  });
  return Object.fromEntries(await Promise.all(pairs));
}
