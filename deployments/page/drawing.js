// Drawing one picture, and turning its events into a state that can be shown.

import { ApiError, events } from "./api.js";
import { base64Of, blobOf, withoutBlobs } from "./dom.js";

/** The JSON body of a request whose pictures are blobs. */
export const bodyOf = (fields) => withoutBlobs(fields, base64Of);

/**
 * Draw one picture.
 * @param fields the request; pictures in it are blobs
 * @param signal aborts the request, also on the server
 * @param tell called with `{state, fraction, preview}`: a text, a number from 0 to 1 or null, a blob or undefined
 * @returns `{blob, seed, seconds}`
 */
export async function draw(fields, signal, tell) {
  const body = { ...(await bodyOf(fields)), stream: true };
  const pace = new Pace();
  for await (const [name, data] of events("v1/image/generation", body, signal)) {
    if (name === "progress") tell(pace.state(data));
    if (name === "preview") tell({ preview: blobOf(data.image) });
    if (name === "result") {
      const [{ image, random_seed: seed }] = data.images;
      return { blob: blobOf(image), seed, seconds: data.inference_time };
    }
  }
  throw new ApiError("The connection ended before the picture came. Draw again.");
}

/** A text and a fraction for each `progress` event. A request may have several stages, each with its own steps. */
class Pace {
  #stage = null;
  #first = null;

  state(data) {
    if (data.state === "restarted") {
      this.#stage = null;
      return { state: "A part of the server was replaced; drawing again", fraction: null };
    }
    if (data.state === "queued") {
      const { position } = data;
      return { state: position > 0 ? `Waiting, ${position} before yours` : "Waiting for its turn", fraction: null };
    }
    const { stage_number: stage, stages, step, steps } = data;
    if (stage !== this.#stage) {
      this.#stage = stage;
      this.#first = { step, at: performance.now() };
    }
    const part = stages > 1 ? `Pass ${stage} of ${stages}, step` : "Step";
    const fraction = (stage - 1 + step / steps) / stages;
    return { state: `${part} ${step} of ${steps}${this.#left(step, steps)}`, fraction };
  }

  /** The remaining time of this stage, estimated from its steps so far. */
  #left(step, steps) {
    const done = step - this.#first.step;
    if (done < 1 || step === steps) return "";
    const seconds = ((performance.now() - this.#first.at) / 1000 / done) * (steps - step);
    return seconds < 1 ? "" : `, ${duration(seconds)} left`;
  }
}

/** A duration as text. */
export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return `${Math.round(seconds / 60)} min`;
}
