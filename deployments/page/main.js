// The page: it gets the server's lists, sends the request of the form, and keeps the pictures in the history.

import { ApiError, get, key, post } from "./api.js";
import { showCode } from "./code.js";
import { askAbout, askForKey, askHowToEnlarge, prepareDialogs } from "./dialogs.js";
import { base64Of, blobOf, find, imageOf, make } from "./dom.js";
import { draw } from "./drawing.js";
import { Form } from "./form.js";
import { history } from "./history.js";
import { pictureIn } from "./pictures.js";
import { Stage } from "./stage.js";

const SEEDS = 2 ** 32;
const SETTINGS = "sdgraph.settings";
const WIDE = matchMedia("(min-width: 56rem)");

let form = null;
/** Aborts the pictures that are being drawn; null if there are none. */
let drawing = null;

const stage = new Stage(
  find("stage"),
  [
    ["Draw again", ({ request, seed }) => restore({ ...request, seed }) && start(1)],
    ["Use settings", ({ request, seed }) => restore({ ...request, seed })],
    ["Start from it", ({ blob }) => form?.take("image", blob)],
    ["Enlarge", enlarge],
    ["Download", download],
    ["Code", ({ request, seed }) => showCode({ ...request, seed })],
    ["Delete", forget, { className: "quiet" }],
  ],
  (text) => {
    form?.change({ prompt: text });
    start();
  },
);

/** Get all the lists that the form needs. */
async function offers() {
  const lists = ["models", "samplers", "styles", "loras", "upscalers"].map((name) => get(`v1/${name}`));
  const [schemas, ...answers] = await Promise.all([get("page/request.json"), ...lists]);
  const [models, samplers, styles, loras, upscalers] = answers.map(({ data }) => data);
  return {
    models,
    loras,
    upscalers,
    samplers: samplers.map(({ name }) => name),
    styles: styles.map(({ name }) => name),
    schemas,
  };
}

/** Create the form. If the server requires a key, ask for the key and try again with it. */
async function open() {
  for (;;) {
    try {
      form = new Form(await offers());
      break;
    } catch (error) {
      if (error.status !== 401) return fail(error);
      const reason = key.get()
        ? `The server did not accept this key (${error.message}).`
        : "This server asks for a key.";
      if (!(await askForKey(reason))) return fail(error);
    }
  }
  form.write(JSON.parse(localStorage.getItem(SETTINGS) ?? "{}"));
  find("problem").hidden = true;
  if (WIDE.matches) form.get("prompt").input.focus();
}

/** Show whether every part of the server is ready, and check again while one is not. */
async function watchServer() {
  const reply = await fetch("readyz").catch(() => null);
  const told = await reply?.json().catch(() => null);
  const states = Object.values(told?.deployments ?? {});
  const up = states.filter((state) => state === "HEALTHY").length;
  find("server").dataset.state = reply?.ok ? "ready" : "waiting";
  find("server").textContent = reply?.ok ? "Ready" : told ? `Starting, ${up} of ${states.length} parts` : "No answer";
  if (!reply?.ok) setTimeout(watchServer, 3000);
}

/** Show a request in the form. Returns false if there is no form yet. */
function restore(fields) {
  form?.write(fields);
  return form !== null;
}

/** Draw as many pictures as the form asks for, with consecutive seeds and at the same time. */
async function start(count = Number(find("count").value)) {
  if (form === null) return open();
  if (drawing !== null) return null;
  form.unmark();
  find("problem").hidden = true;
  const request = form.read();
  if (!request.prompt) return fail(new ApiError("Say what the picture should show.", { param: "prompt" }));
  if (form.broken) return fail(new ApiError(form.broken.validationMessage), form.broken);
  const { prompt: _, ...settings } = request;
  const kept = Object.entries(settings).filter(([, value]) => typeof value !== "object");
  localStorage.setItem(SETTINGS, JSON.stringify(Object.fromEntries(kept)));

  const first = request.seed >= 0 ? request.seed : crypto.getRandomValues(new Uint32Array(1))[0];
  const requests = Array.from({ length: count }, (_, i) => ({ ...request, seed: (first + i) % SEEDS }));
  drawing = new AbortController();
  const tiles = stage.begin(count, { ...form.model.defaults, ...request });
  if (!WIDE.matches) find("stage").scrollIntoView({ behavior: "smooth" });
  busy(true);
  const told = new Narrator(tiles);
  const finished = requests.map((each, i) => drawOne(each, tiles[i], told));
  const ends = await Promise.allSettled(finished);
  told.end(tiles.filter(({ done }) => done).length);
  drawing = null;
  busy(false);
  const failed = ends.find(({ status }) => status === "rejected");
  return failed ? fail(failed.reason) : null;
}

async function drawOne(request, tile, told) {
  const { signal } = drawing;
  try {
    const drawn = await draw({ preview: true, ...request }, signal, (state) => {
      tile.tell(state);
      told.tell();
    });
    const picture = { ...drawn, request };
    stage.finish(tile, picture);
    await remember(picture);
  } catch (error) {
    stage.drop(tile);
    const cancelled = signal.aborted;
    drawing.abort(); // the other pictures would fail with the same error
    if (!cancelled) throw error;
  }
}

/** Enlarge a drawn picture. It keeps the request of the small one. */
async function enlarge({ blob, request, seed }) {
  if (form === null || drawing !== null) return;
  const how = await askHowToEnlarge(form.upscalers);
  if (how === null) return;
  drawing = new AbortController();
  busy(true);
  const [tile] = stage.begin(1, { ...form.model.defaults, ...request });
  tile.tell({ state: "Enlarging", preview: blob });
  let failed = null;
  try {
    const body = { image: await base64Of(blob), output_format: request.output_format ?? "jpeg", ...how };
    const { images, inference_time: seconds } = await post("v1/images/upscale", body, drawing.signal);
    const picture = { blob: blobOf(images[0].image), request, seed, seconds };
    stage.finish(tile, picture);
    await remember(picture);
  } catch (error) {
    stage.drop(tile);
    failed = drawing.signal.aborted ? null : error;
  }
  drawing = null;
  busy(false);
  if (failed) await fail(failed);
}

/** The progress of all pictures together, as a bar and as text; screen readers are told every quarter. */
class Narrator {
  #tiles;
  #quarter = -1;

  constructor(tiles) {
    this.#tiles = tiles;
    this.tell();
    announce("Drawing");
  }

  tell() {
    const fraction = this.#tiles.reduce((sum, tile) => sum + tile.fraction, 0) / this.#tiles.length;
    find("progress").value = fraction;
    document.title = `${Math.floor(fraction * 100)} % · sdgraph`;
    find("told").textContent = this.#tiles.find(({ done }) => !done)?.state ?? "";
    const quarter = Math.floor(fraction * 4);
    if (quarter > this.#quarter && quarter > 0) announce(`${quarter * 25} percent`);
    this.#quarter = Math.max(quarter, this.#quarter);
  }

  end(count) {
    document.title = "sdgraph";
    find("told").textContent = "";
    announce(count ? (count > 1 ? `${count} pictures are done` : "The picture is done") : "Nothing was drawn");
  }
}

const announce = (words) => (find("announced").textContent = words);

function busy(yes) {
  find("progress").hidden = !yes;
  find("draw").hidden = yes;
  find("cancel").hidden = !yes;
  for (const idle of document.querySelectorAll(".idle")) idle.hidden = yes;
  (yes ? find("cancel") : find("draw")).focus({ preventScroll: true });
}

/** Show an error, beside the field that it names if there is one. */
async function fail(error, input = null) {
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401 && form !== null) {
    if (await askForKey(`The server did not accept the key (${error.message}).`)) await start();
    return;
  }
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  find("problem").textContent = error.message + again;
  find("problem").hidden = false;
  if (input) form.markInput(input, error.message);
  else if (error.param) form?.mark(error.param, error.message);
}

// The history.

async function remember(picture) {
  try {
    list(Object.assign(picture, await history.keep(picture)), true);
  } catch {
    announce("This browser has no room to keep the picture"); // it is still on the stage
  }
}

function list(picture, first) {
  const image = imageOf(picture.small, picture.request.prompt, { loading: "lazy" });
  const entry = make("li", {}, make("button", { type: "button", onclick: () => stage.look(picture) }, image));
  entry.dataset.id = picture.id;
  find("pictures")[first ? "prepend" : "append"](entry);
  find("history").hidden = false;
}

async function forget(picture) {
  if (picture.id) await history.remove(picture.id);
  find("pictures").querySelector(`[data-id="${picture.id}"]`)?.remove();
  find("stage").replaceChildren(make("p", { className: "hint" }, "Deleted."));
  find("history").hidden = !find("pictures").hasChildNodes();
}

function download({ blob, request, seed }) {
  const words = request.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["picture"];
  const ending = blob.type.split("/")[1].replace("jpeg", "jpg");
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: `${words.slice(0, 6).join("-")}-${seed}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** Handle a picture that was dropped or pasted. */
async function bring(transfer) {
  const blob = pictureIn(transfer);
  if (form === null || !transfer.files.length || document.querySelector("dialog[open]")) return;
  if (blob === null) return fail(new ApiError("Only PNG, JPEG and WebP pictures can be used."));
  try {
    const [what, request, needs] = await askAbout(blob, form.steers);
    if (what === "start") form.take("image", blob);
    if (what === "control") form.take("control", blob);
    if (what !== "redraw") return;
    restore(request);
    if (!needs.length && request.prompt) await start(1);
    else find("settings").open = true;
  } catch (error) {
    await fail(error);
  }
}

// Event handlers.

find("form").onsubmit = (event) => {
  event.preventDefault();
  start();
};
find("form").addEventListener("input", () => form?.count());
find("cancel").onclick = () => drawing?.abort();
find("open-key").onclick = async () => {
  if ((await askForKey()) && form === null) await open();
};
find("open-code").onclick = () => form && showCode(form.read());
find("clear-history").onclick = async () => {
  if (!confirm("Delete all pictures that this browser keeps?")) return;
  await history.clear();
  find("pictures").replaceChildren();
  find("history").hidden = true;
};
addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
  if (event.key === "Escape") drawing?.abort();
});
// Office programs copy a picture of the text together with the text.
addEventListener("paste", ({ clipboardData: data }) => data.types.includes("text/plain") || bring(data));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.toggle("dragging", event.dataTransfer.types.includes("Files"));
});
addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  bring(event.dataTransfer);
});

// On narrow screens the settings are collapsed, so that the picture is visible.
const fold = () => (find("settings").open = WIDE.matches);
WIDE.addEventListener("change", fold);
fold();
prepareDialogs();
watchServer();
open();
history.all().then((pictures) => pictures.forEach((picture) => list(picture, false)), () => {});
