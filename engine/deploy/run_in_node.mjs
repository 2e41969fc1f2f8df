// Run an ONNX model on images in Node.js: node run_in_node.mjs PACKAGE MODEL IMAGES OUTPUT SHAPE
//
// PACKAGE (onnxruntime-web or onnxruntime-node) is that of the current folder. IMAGES are raw
// uint8; SHAPE is theirs, as in 100,3,32,32. OUTPUT gets JSON: the package's version, and of every
// output of the model its name, its type and the bytes of each batch, in base64.

import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [name, modelPath, imagesPath, outputPath, shape] = process.argv.slice(2);
const BATCH = 100;
const require = createRequire(join(process.cwd(), "package.json"));
const ort = require(name);
const folder = join(process.cwd(), "node_modules", name);
const { version } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));

const [n, ...imageShape] = shape.split(",").map(Number);
const size = imageShape.reduce((a, b) => a * b, 1);
const pixels = new Uint8Array(readFileSync(imagesPath));
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(modelPath)));
const outputs = session.outputNames.map((each) => ({ name: each, type: "", batches: [] }));
for (let i = 0; i < n; i += BATCH) {
  const batch = pixels.slice(i * size, Math.min(n, i + BATCH) * size);
  const images = new ort.Tensor("uint8", batch, [batch.length / size, ...imageShape]);
  const results = await session.run({ images });
  for (const output of outputs) {
    const { type, data } = results[output.name];
    output.type = type;
    const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
    output.batches.push(bytes.toString("base64"));
  }
}
writeFileSync(outputPath, JSON.stringify({ version, outputs }));
