// The request as code that makes the same picture as this page. Its body lacks only the two fields that ask for events
// and previews. It reads pictures from files, and the key from an environment variable.

import { key } from "./api.js";
import { find, make, withoutBlobs } from "./dom.js";

const KEY = "SDGRAPH_KEY";
const LANGUAGES = { curl: curl, Python: python, JavaScript: javascript };

/** A picture as a file beside the program. */
class FileName {
  constructor(name) {
    this.name = name;
  }
}

/** The request as code: language -> text, and the files that it reads: name -> blob. */
export async function codeOf(fields) {
  const { preview: _, ...request } = fields;
  const files = new Map();
  const body = await withoutBlobs(request, (blob, name) => {
    const file = `${name}.${blob.type.split("/")[1].replace("jpeg", "jpg")}`;
    files.set(file, blob);
    return new FileName(file);
  });
  const call = {
    url: new URL("v1/image/generation", document.baseURI).href,
    body,
    kept: `picture.${(fields.output_format ?? "jpeg").replace("jpeg", "jpg")}`,
    keyed: key.get() !== "",
  };
  const texts = Object.entries(LANGUAGES).map(([language, write]) => [language, write(call)]);
  return { texts: Object.fromEntries(texts), files };
}

/**
 * A value as a literal of a language.
 * @param read how the language reads a file as base64
 * @param words how it says true, false and null
 */
function literal(value, read, { words = {}, step = "  ", depth = 1 } = {}) {
  const inside = (entry) => literal(entry, read, { words, step, depth: depth + 1 });
  if (value instanceof FileName) return read(value.name);
  if (Array.isArray(value)) return `[${value.map(inside).join(", ")}]`;
  if (value !== null && typeof value === "object") {
    const pairs = Object.entries(value).map(([name, entry]) => `${step.repeat(depth)}"${name}": ${inside(entry)}`);
    return `{\n${pairs.join(",\n")}\n${step.repeat(depth - 1)}}`;
  }
  return (typeof value !== "string" && words[value]) || JSON.stringify(value);
}

function curl({ url, body, kept, keyed }) {
  const files = [];
  const read = (name) => `"@@${files.push(name) - 1}@@"`;
  let json = literal(body, read);
  // A quoted END stops the shell from expanding the here-document; without quotes it inserts the pictures.
  if (files.length) {
    json = json.replace(/[\\$`]/g, "\\$&");
    json = json.replace(/@@(\d+)@@/g, (_, index) => `$(base64 < ${files[index]} | tr -d '\\n')`);
  }
  const lines = [`curl --fail-with-body -o ${kept} ${url}`, "-H 'Content-Type: application/json' -H 'Accept: image/*'"];
  if (keyed) lines.push(`-H "Authorization: Bearer $${KEY}"`);
  return `${[...lines, `--data-binary @- <<${files.length ? "END" : "'END'"}`].join(" \\\n  ")}\n${json}\nEND`;
}

function python({ url, body, kept, keyed }) {
  const json = literal(body, (name) => `base64_of("${name}")`, {
    words: { true: "True", false: "False", null: "None" },
    step: "    ",
  });
  const reader = `def base64_of(name):
    return base64.b64encode(open(name, "rb").read()).decode()

`;
  const reads = json.includes("base64_of(");
  return `${reads ? "import base64\n" : ""}import json${keyed ? "\nimport os" : ""}
import urllib.request

${reads ? reader : ""}body = ${json}
headers = {"Content-Type": "application/json", "Accept": "image/*"}
${keyed ? `headers["Authorization"] = "Bearer " + os.environ["${KEY}"]\n` : ""}\
request = urllib.request.Request("${url}", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request) as reply:
    open("${kept}", "wb").write(reply.read())`;
}

function javascript({ url, body, kept, keyed }) {
  const json = literal(body, (name) => `await readFile("${name}", "base64")`);
  const imports = json.includes("await readFile(") ? "readFile, writeFile" : "writeFile";
  const authorization = keyed ? `\n  Authorization: \`Bearer \${process.env.${KEY}}\`,` : "";
  return `import { ${imports} } from "node:fs/promises";

const body = ${json};
const headers = {
  "Content-Type": "application/json",
  Accept: "image/*",${authorization}
};
const url = "${url}";
const reply = await fetch(url, { method: "POST", headers, body: JSON.stringify(body) });
if (!reply.ok) throw new Error(await reply.text());
await writeFile("${kept}", new Uint8Array(await reply.arrayBuffer()));`;
}

let chosen = "curl";

/** Show the dialog with a request as code. */
export async function showCode(fields) {
  const { texts, files } = await codeOf(fields);
  const links = [...files].map(([name, blob]) => make("a", { href: URL.createObjectURL(blob), download: name }, name));
  const reads = links.length ? ["It reads from the current folder: ", ...links.flatMap((link) => [link, " "])] : [];
  const keyed = key.get() ? `The key comes from the environment variable ${KEY}.` : "";
  find("code-note").replaceChildren(...reads, keyed);
  const show = (language) => {
    chosen = language;
    find("code").textContent = texts[language];
    for (const tab of tabs) tab.setAttribute("aria-selected", String(tab.textContent === language));
  };
  const tabs = Object.keys(texts).map((language) =>
    make("button", { type: "button", role: "tab", onclick: () => show(language) }, language),
  );
  find("code-dialog").querySelector(".tabs").replaceChildren(...tabs);
  const copy = find("copy");
  copy.textContent = "Copy";
  copy.onclick = async () => {
    await navigator.clipboard.writeText(find("code").textContent).then(
      () => (copy.textContent = "Copied"),
      () => getSelection().selectAllChildren(find("code")), // without a clipboard (plain HTTP): Ctrl+C copies it
    );
  };
  show(chosen);
  find("code-dialog").showModal();
}
