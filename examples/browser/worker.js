// The model in a thread of its own, so that the page stays responsive. Messages in: {load, provider}, {ask}, {stop}. Out: {progress}, {ready},
// {prompt}, {piece}, {done}, {problem}.

import { Decoder } from "./decoder.js";
import { readFiles, readManifest } from "./download.js";
import { sample } from "./sampling.js";
import { Text } from "./text.js";

// A package of ONNX Runtime for each: that with WebGPU has larger files.
const RUNTIMES = {
  wasm: "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  webgpu: "./node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
};
const MOST_THREADS = 8;

let model = null;
let stopped = false;

// Lets messages in between two tokens. A timer would wait for four milliseconds.
const { port1, port2 } = new MessageChannel();
const breathe = () => new Promise((resolve) => ((port2.onmessage = resolve), port1.postMessage(null)));

async function load(address, provider) {
  if (!(provider in RUNTIMES)) throw new Error(`There is no provider ${provider}: use wasm or webgpu.`);
  const ort = await import(RUNTIMES[provider]);
  // Threads share memory, which browsers give only to pages with the headers of serve.py.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
  const manifest = await readManifest(address);
  const files = await readFiles(address, manifest, (done, total) => postMessage({ progress: { done, total } }));
  postMessage({ progress: { opening: true } });
  const [text, decoder] = [new Text(files), await Decoder.open(ort, manifest, files, [provider])];
  model = { text, decoder, stopIds: new Set(manifest.stop_ids) };
  const threads = ort.env.wasm.numThreads;
  postMessage({ ready: { precision: manifest.precision, context: manifest.max_context, provider, threads, chats: text.chats } });
}

async function answer({ prompt, thinking, temperature, most }) {
  const { text, decoder, stopIds } = model;
  stopped = false;
  decoder.reset();
  const ids = text.encode(prompt, thinking);
  if (!ids.length) throw new Error("The prompt is empty.");
  const started = performance.now();
  let logits = await decoder.read(ids, (read) => postMessage({ prompt: { read, total: ids.length } }));
  const first = performance.now();
  const [complete, tokens] = [text.stream(), []];
  let finish = "length";
  while (tokens.length < most) {
    const token = sample(logits, temperature);
    if (stopIds.has(token)) {
      finish = "stop";
      break;
    }
    tokens.push(token);
    postMessage({ piece: complete(token) });
    await breathe();
    if (stopped || !decoder.room) {
      finish = stopped ? "stopped" : "length";
      break;
    }
    if (tokens.length < most) logits = await decoder.read([token]);
  }
  const seconds = (performance.now() - first) / 1000;
  postMessage({ done: { finish, tokens, promptTokens: ids.length, promptSeconds: (first - started) / 1000, seconds } });
}

self.onmessage = async ({ data }) => {
  if (data.stop) {
    stopped = true;
    return;
  }
  try {
    if (data.load) await load(data.load, data.provider);
    else await answer(data.ask);
  } catch (error) {
    postMessage({ problem: error.message ?? String(error) });
  }
};
