// Pictures that were drawn here, kept in this browser's IndexedDB with their requests.

const STORE = "pictures";
/** The largest number of pictures that are kept; older ones are deleted. */
const MOST = 300;
const SMALL = 192;

let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("sdgraph", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function ask(mode, question) {
  const request = question((await open()).transaction(STORE, mode).objectStore(STORE));
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** A thumbnail for the list. */
async function small(blob) {
  const bitmap = await createImageBitmap(blob, { resizeWidth: SMALL, resizeQuality: "high" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/webp", quality: 0.8 });
}

export const history = {
  /** All pictures, the newest first. */
  all: async () => (await ask("readonly", (store) => store.getAll())).reverse(),

  /**
   * Keep a picture `{blob, request, seed, seconds}`; returns it with its id. When the browser's storage is full, the
   * oldest pictures are deleted.
   */
  async keep(picture) {
    const entry = { ...picture, at: Date.now(), small: await small(picture.blob) };
    const ids = await ask("readonly", (store) => store.getAllKeys());
    for (const id of ids.slice(0, Math.max(0, ids.length + 1 - MOST))) await this.remove(id);
    for (;;) {
      try {
        return { ...entry, id: await ask("readwrite", (store) => store.add(entry)) };
      } catch (error) {
        const [oldest] = await ask("readonly", (store) => store.getAllKeys(null, 1));
        if (error?.name !== "QuotaExceededError" || oldest === undefined) throw error;
        await this.remove(oldest);
      }
    }
  },

  remove: (id) => ask("readwrite", (store) => store.delete(id)),
  clear: () => ask("readwrite", (store) => store.clear()),
};
