// Hyperbolic's provider for Vercel's AI SDK.
import assert from "node:assert";
import { writeFileSync } from "node:fs";
import { createHyperbolic } from "@hyperbolic/ai-sdk-provider";
import { generateImage } from "ai";

const [url, key, folder] = process.argv.slice(2);
const hyperbolic = createHyperbolic({ apiKey: key, baseURL: `${url}/v1` });
const small = { size: "256x256", maxRetries: 0, providerOptions: { hyperbolic: { steps: 8, cfgScale: 5 } } };

const { image, responses } = await generateImage({
  model: hyperbolic.imageModel("SDXL1.0-base"),
  prompt: "a photo of an astronaut",
  ...small,
});
writeFileSync(`${folder}/astronaut.jpg`, image.uint8Array);
assert.equal(responses[0].headers["x-backend"], "torch");

const { images } = await generateImage({
  model: hyperbolic.imageModel("SD1.5"),
  prompt: "an apple on a teal background",
  n: 2,
  ...small,
});
assert.equal(images.length, 2);
images.forEach((one, i) => writeFileSync(`${folder}/apple-${i}.jpg`, one.uint8Array));

await assert.rejects(
  generateImage({ model: hyperbolic.imageModel("SD9"), prompt: "x", ...small }),
  (error) => error.statusCode === 400 && error.message.includes("SD1.5"),
);
