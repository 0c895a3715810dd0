// The files of a bundle, by its manifest: with progress, and checked against the hash that the manifest has of each.

const NEEDED = ["decoder.onnx", "prefill.onnx", "model.weights", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

/** The manifest of the bundle at `base`, an address that ends in a slash. Throws an Error whose message says what to do. */
export async function readManifest(base) {
  const answer = await fetch(new URL("manifest.json", base));
  if (!answer.ok) throw new Error(`There is no bundle at ${base}: ${answer.status} ${answer.statusText}.`);
  const manifest = await answer.json();
  if (manifest.schema !== 3) throw new Error(`The bundle has schema ${manifest.schema}, and this page reads schema 3.`);
  const { name, precision } = manifest.target;
  if (name !== "onnx") throw new Error(`The bundle is for the target ${name}. Build one with --target onnx.`);
  if (Object.keys(manifest.references).length) throw new Error("The bundle refers to weights outside it. Copy it with qwen-export package.");
  return { ...manifest, precision };
}

/** All files that the page needs, as Uint8Arrays by name. `report(done, total)` counts bytes. */
export async function readFiles(base, manifest, report) {
  const names = NEEDED.filter((name) => name in manifest.files);
  const total = names.reduce((sum, name) => sum + manifest.files[name].size, 0);
  let done = 0;
  const files = {};
  for (const name of names) {
    files[name] = await readFile(new URL(name, base), manifest.files[name], (count) => report((done += count), total));
  }
  return files;
}

async function readFile(url, entry, report) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be read: ${answer.status} ${answer.statusText}.`);
  const bytes = new Uint8Array(entry.size);
  let at = 0;
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > entry.size) throw new Error(`${url} is longer than the manifest says. Copy the bundle again.`);
    bytes.set(value, at);
    at += value.length;
    report(value.length);
  }
  if (at < entry.size) throw new Error(`${url} ends after ${at} of ${entry.size} bytes. Load the page again.`);
  // Pages that are not secure have no hashes.
  if (crypto.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (found !== entry.sha256) throw new Error(`${url} is not what the manifest describes. Copy the bundle again.`);
  }
  return bytes;
}
