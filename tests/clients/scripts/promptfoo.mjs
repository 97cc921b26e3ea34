// promptfoo's command with a configuration of both its image providers that can be pointed here, as its manual has it.
import assert from "node:assert";
import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [url, key, folder] = process.argv.slice(2);
const promptfoo = join(dirname(fileURLToPath(import.meta.url)), "node_modules", ".bin", "promptfoo");
const small = { width: 256, height: 256, steps: 8, cfg_scale: 5, seed: 7 };
const server = { apiBaseUrl: `${url}/v1`, apiKey: key };

const providers = [
  { id: "openai:image:SD1.5", label: "openai-url", config: { ...server, size: "256x256" } },
  { id: "openai:image:dall-e-2", label: "openai-b64", config: { ...server, size: "256x256", response_format: "b64_json" } },
  { id: "hyperbolic:image:SDXL1.0-base", label: "hyperbolic-url", config: { ...server, ...small } },
  {
    id: "hyperbolic:image:SD1.5",
    label: "hyperbolic-b64",
    config: { ...server, ...small, negative_prompt: "fog", sampler: "Euler a", response_format: "b64_json" },
  },
];
const config = { prompts: ["{{what}} on a teal background"], providers, tests: [{ vars: { what: "an apple" } }] };
writeFileSync(join(folder, "promptfooconfig.json"), JSON.stringify(config));
// Its status tells failed evaluations; out.json tells which, and why.
spawnSync(
  promptfoo,
  ["eval", "-c", "promptfooconfig.json", "-o", "out.json", "--no-cache", "--no-table", "--no-progress-bar", "-j", "1"],
  {
    cwd: folder,
    stdio: ["ignore", "ignore", "inherit"],
    env: {
      ...process.env,
      PROMPTFOO_DISABLE_TELEMETRY: "1",
      PROMPTFOO_DISABLE_UPDATE: "1",
      PROMPTFOO_INLINE_MEDIA: "true", // pictures go into out.json, not into its own store
    },
  },
);

const { results } = JSON.parse(readFileSync(join(folder, "out.json"), "utf8")).results;
assert.equal(results.length, providers.length);
for (const { provider, response, error } of results) {
  assert.ok(!error && !response.error, `${provider.label}: ${error ?? response.error}`);
  const output = response.output;
  const data = typeof output === "string" && output.startsWith("{") ? JSON.parse(output).data[0].b64_json : output;
  const base64 = data.match(/base64,([A-Za-z0-9+/=]+)/)?.[1] ?? data;
  const bytes = Buffer.from(base64, "base64");
  const suffix = bytes[0] === 0x89 ? "png" : "jpg";
  writeFileSync(join(folder, `${provider.label}.${suffix}`), bytes);
}
