// The dialogs for the key, for enlarging a picture, and for a picture that was dropped or pasted.

import { key, post } from "./api.js";
import { base64Of, find, make, show } from "./dom.js";

export function prepareDialogs() {
  for (const close of document.querySelectorAll("[data-close]")) {
    close.onclick = () => close.closest("dialog").close();
  }
}

const closed = (dialog) => new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));

/** Ask for the key; `reason` says why. Returns whether one was given. */
export async function askForKey(reason = "") {
  const dialog = find("key-dialog");
  if (dialog.open) return false;
  if (reason) find("key-reason").textContent = reason;
  find("key").value = key.get();
  find("keep-key").checked = key.kept();
  let given = false;
  dialog.querySelector("form").onsubmit = () => {
    key.set(find("key").value.trim(), find("keep-key").checked);
    given = true;
  };
  dialog.showModal();
  find("key").select();
  await closed(dialog);
  return given;
}

/** Ask how a picture is enlarged; `upscalers` are those of the server. Null if it was cancelled. */
export async function askHowToEnlarge(upscalers) {
  const dialog = find("enlarge-dialog");
  const fit = upscalers.filter(({ upscale }) => upscale);
  const options = fit.map(({ name, default: standard }) => make("option", { value: name, selected: standard }, name));
  find("upscaler").replaceChildren(...options);
  dialog.returnValue = "";
  dialog.showModal();
  await closed(dialog);
  return dialog.returnValue ? { upscaler: find("upscaler").value, scale: Number(find("scale").value) } : null;
}

const PICTURES = {
  image: "the picture it started from",
  mask_image: "its mask",
  controlnet_image: "its control photo",
};

/**
 * Ask what to do with a picture.
 * @param steers whether the chosen model takes control photos
 * @returns `[what, request, needs]`: "redraw", "start", "control" or null; the request that is stored in its
 *   file, and the fields of pictures that this request lacks
 */
export async function askAbout(blob, steers) {
  const info = await post("v1/images/info", { image: await base64Of(blob) });
  const dialog = find("dropped-dialog");
  show(find("dropped"), blob);
  const missing = info.needs.map((name) => PICTURES[name] ?? "a control's photo");
  const { model_name: model = "another model", seed = "unknown" } = info.request ?? {};
  const says = info.request
    ? `Its file says how it was made: ${model}, seed ${seed}.`
    : "Its file does not say how it was made.";
  const lacks = missing.length ? ` It does not contain ${missing.join(" and ")}, which you have to choose again.` : "";
  find("dropped-says").textContent = says + lacks;
  find("dropped-redraw").hidden = !info.request;
  find("dropped-control").hidden = !steers;
  const answers = { redraw: find("dropped-redraw"), start: find("dropped-start"), control: find("dropped-control") };
  for (const [answer, chosen] of Object.entries(answers)) chosen.onclick = () => dialog.close(answer);
  dialog.returnValue = "";
  dialog.showModal();
  await closed(dialog);
  const what = dialog.returnValue || null;
  return [what, info.request, info.needs];
}
