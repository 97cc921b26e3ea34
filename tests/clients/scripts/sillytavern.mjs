// SillyTavern's server: its routes of image generation, as its page calls them, forward to the AUTOMATIC1111 API.
import assert from "node:assert";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { copyFileSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const [url, key, folder] = process.argv.slice(2);
const home = join(dirname(fileURLToPath(import.meta.url)), "node_modules", "sillytavern");

const port = await new Promise((found) => {
  const probe = createServer().listen(0, "127.0.0.1", () => {
    const { port } = probe.address();
    probe.close(() => found(port));
  });
});
copyFileSync(join(home, "default", "config.yaml"), join(folder, "config.yaml"));
const options = {
  "--configPath": join(folder, "config.yaml"),
  "--dataRoot": join(home, "..", "..", "data"), // here it keeps what it compiles of its page, which takes a minute
  "--port": port,
  "--listen": false,
  "--browserLaunchEnabled": false,
};
const server = spawn(process.execPath, [join(home, "server.js"), ...Object.entries(options).flat(), "--disableCsrf"], {
  stdio: ["ignore", "pipe", "inherit"],
});
server.stdout.setEncoding("utf8");

async function ask(route, body = {}) {
  const reply = await fetch(`http://127.0.0.1:${port}/api/sd/${route}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ url, auth: `user:${key}`, ...body }),
  });
  assert.ok(reply.ok, `${route}: ${reply.status}`);
  const text = await reply.text();
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

async function answers() {
  for await (const text of server.stdout) {
    if (text.includes("SillyTavern is listening")) return;
  }
  throw new Error("SillyTavern ended before it listened");
}

try {
  await answers();
  server.stdout.resume();
  await ask("ping");
  const models = (await ask("models")).map((model) => model.value);
  const model = models.find((title) => title.startsWith("SD1.5 ")) ?? models.find((title) => title.startsWith("SD1.5"));
  await ask("set-model", { model });
  assert.equal(await ask("get-model"), model);
  const samplers = await ask("samplers");
  assert.ok(samplers.includes("Euler a"));
  assert.ok((await ask("schedulers")).includes("karras"));
  const upscalers = await ask("upscalers");
  assert.ok(upscalers.includes("Latent"));
  assert.ok(Array.isArray(await ask("vaes")));

  // What its page sends (`generateAutoImage`), with a second pass.
  const drawn = await ask("generate", {
    prompt: "an apple on a teal background",
    negative_prompt: "fog",
    sampler_name: "DPM++ 2M",
    scheduler: "karras",
    steps: 8,
    cfg_scale: 5,
    width: 128,
    height: 128,
    restore_faces: false,
    enable_hr: true,
    hr_upscaler: "Latent",
    hr_scale: 2,
    hr_additional_modules: [],
    denoising_strength: 0.7,
    hr_second_pass_steps: 4,
    seed: 7,
    override_settings: { CLIP_stop_at_last_layers: 1, sd_vae: "Automatic", forge_additional_modules: [] },
    override_settings_restore_afterwards: true,
    clip_skip: 1,
    save_images: true,
    send_images: true,
    do_not_save_grid: false,
    do_not_save_samples: false,
  });
  writeFileSync(`${folder}/apple.png`, Buffer.from(drawn.images[0], "base64"));

  await ask("sdcpp/ping"); // OPTIONS, without a key; its other routes send none, so they need a server without keys
} finally {
  server.kill();
  if (server.exitCode === null) await once(server, "exit");
}
