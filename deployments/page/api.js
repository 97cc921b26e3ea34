// The server's API: the key, errors in the contract's form, and server-sent events over fetch.
// Addresses are relative to the page, so that it also works behind a path of a gateway.

const KEY = "sdgraph.key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "",
  kept: () => localStorage.getItem(KEY) !== null,
  /** Use a key until this tab is closed or, with `keep`, until it is changed on this page. */
  set(text, keep) {
    sessionStorage.removeItem(KEY);
    localStorage.removeItem(KEY);
    if (text) (keep ? localStorage : sessionStorage).setItem(KEY, text);
  },
};

/** What went wrong, in words for the person at the screen; `param` names the field. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }

  /** An error from the body of a reply or of an `error` event, which have the same form. */
  static of(body, status = 0, retryAfter = null) {
    return new ApiError(body?.message ?? `The server answered with status ${status}.`, {
      status,
      param: body?.param ?? null,
      retryAfter,
    });
  }
}

async function call(path, { headers = {}, ...options } = {}) {
  const sent = new Headers(headers);
  if (key.get()) sent.set("Authorization", `Bearer ${key.get()}`);
  let reply;
  try {
    reply = await fetch(path, { ...options, headers: sent });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it still running?");
  }
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => null);
  throw ApiError.of(body, reply.status, reply.headers.get("retry-after"));
}

/** The JSON that a GET request is answered with. */
export const get = async (path) => (await call(path)).json();

const posted = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** The response to a POST request. */
export const post = async (path, body, signal) => (await call(path, posted(body, signal))).json();

/**
 * The events of a watched request, as `[name, data]`. An `error` event is thrown. Leaving the loop, or aborting
 * `signal`, closes the connection, which ends the work on the server.
 */
export async function* events(path, body, signal) {
  const reply = await call(path, posted(body, signal));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw signal?.aborted ? error : new ApiError("The connection to the server broke off. Draw again.");
      });
      if (done) return;
      rest += value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/:\s?(.*)/s, 2)));
        if (fields.event === "error") throw ApiError.of(JSON.parse(fields.data));
        if (fields.event) yield [fields.event, JSON.parse(fields.data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
