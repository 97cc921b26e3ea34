// The main area: pictures that are being drawn, and finished ones with their actions.

import { post } from "./api.js";
import { base64Of, button, make, show } from "./dom.js";
import { duration } from "./drawing.js";

const EXAMPLES = ["a sailboat on a blue background", "a penguin in the snow", "a cactus on a yellow background"];

export class Stage {
  #element;
  #actions;
  #tiles = make("div", { className: "tiles" });
  #below = make("div", { className: "below" });

  /**
   * @param actions the actions on a picture: `[text, (picture) => ..., properties]`
   * @param example called with the text of an example
   */
  constructor(element, actions, example) {
    this.#element = element;
    this.#actions = actions;
    element.append(
      make(
        "div",
        { className: "empty" },
        make("p", {}, "Say what you want to see, then press Draw."),
        make("p", { className: "examples" }, EXAMPLES.map((text) => button(text, () => example(text)))),
        make("p", { className: "hint" }, "Drop a picture here to redraw it, start from it or steer by it."),
      ),
    );
  }

  /** Create tiles for `count` pictures, whose shape is about `width` to `height`. */
  begin(count, { width, height }) {
    this.#element.replaceChildren(this.#tiles, this.#below);
    this.#below.replaceChildren();
    const tiles = Array.from({ length: count }, () => new Tile(width / height));
    this.#tiles.replaceChildren(...tiles.map(({ element }) => element));
    this.#tiles.classList.toggle("several", count > 1);
    return tiles;
  }

  /** Show the finished picture in its tile. The first finished picture is selected. */
  finish(tile, picture) {
    tile.finish(picture);
    tile.element.onclick = () => this.#look(tile, picture);
    if (!this.#below.hasChildNodes()) this.#look(tile, picture);
  }

  /** Remove a tile. If it was the last one, say that nothing was drawn. */
  drop(tile) {
    tile.element.remove();
    if (this.#tiles.hasChildNodes()) return;
    this.#below.replaceChildren(make("p", { className: "hint" }, "Nothing was drawn."));
  }

  /** Show one picture of the history. */
  look(picture) {
    const [tile] = this.begin(1, { width: 1, height: 1 });
    this.finish(tile, picture);
  }

  #look(tile, picture) {
    for (const other of this.#tiles.children) other.setAttribute("aria-pressed", String(other === tile.element));
    const { request, seed, seconds } = picture;
    const facts = make("p", { className: "facts" });
    const told = [request.model_name, `seed ${seed}`, seconds && duration(seconds)].filter(Boolean).join(" · ");
    tile.sized.then(([width, height]) => (facts.textContent = `${width} × ${height} · ${told}`));
    const actions = this.#actions.map(([text, act, more]) => button(text, () => act(picture), more));
    this.#below.replaceChildren(
      make("p", { className: "said" }, request.prompt),
      facts,
      make("div", { className: "row" }, actions),
      planOf(picture),
    );
  }
}

/** One picture that is being drawn or is finished. */
class Tile {
  #image = make("img", { alt: "" });
  #state = make("span", { className: "state" }, "Sending the request");
  #bar = make("span", { className: "bar" });

  constructor(ratio) {
    this.element = make("button", { type: "button", className: "tile making" }, this.#image, this.#bar, this.#state);
    this.element.style.setProperty("--ratio", ratio);
    this.sized = new Promise((resolve) => (this.#sized = resolve));
  }

  #sized;
  fraction = 0;
  done = false;

  tell({ state, fraction, preview }) {
    if (preview) show(this.#image, preview);
    if (state) this.#state.textContent = this.state = state;
    if (fraction === undefined) return;
    this.fraction = fraction ?? 0;
    this.#bar.style.transform = `scaleX(${this.fraction})`;
  }

  finish({ blob, request, seed }) {
    show(this.#image, blob);
    this.#image.decode().then(() => {
      const { naturalWidth: width, naturalHeight: height } = this.#image;
      this.element.style.setProperty("--ratio", width / height);
      this.#sized([width, height]);
    });
    this.#image.alt = request.prompt;
    this.#bar.remove();
    this.#state.remove();
    this.element.classList.remove("making");
    this.element.setAttribute("aria-label", `Picture with seed ${seed}`);
    this.fraction = 1;
    this.done = true;
  }
}

/** The plan that is stored in the file, which is read when the section is opened. */
function planOf({ blob }) {
  const said = make("pre", { tabIndex: 0, ariaLabel: "Plan" });
  const details = make("details", { className: "plan" }, make("summary", {}, "The plan in its file"), said);
  details.ontoggle = async () => {
    if (!details.open || said.textContent) return;
    said.textContent = "Reading…";
    try {
      const { plan, digital_source_type: marking } = await post("v1/images/info", { image: await base64Of(blob) });
      const source = marking ? `Marked as ${marking.split("/").pop()}\n\n` : "";
      said.textContent = source + (plan ? JSON.stringify(plan, null, 2) : "The file has no plan of this server's.");
    } catch (error) {
      said.textContent = error.message;
    }
  };
  return details;
}
