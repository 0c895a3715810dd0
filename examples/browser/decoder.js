// The graphs of a bundle, and the states of one sequence: prefill reads up to T tokens of a prompt, decoder one token, with logits.

const ARRAYS = { float: Float32Array, float16: Uint16Array, int32: Int32Array, int64: BigInt64Array };
const TYPES = { float: "float32", float16: "float16", int32: "int32", int64: "int64" };
const READ_AGAIN = ".read"; // a second input of the same state

export class Decoder {
  #ort;
  #sessions;
  #manifest;
  #tables;
  #states;

  /** `files`: what readFiles gives. `providers`: execution providers of ONNX Runtime, such as ["wasm"]. */
  static async open(ort, manifest, files, providers) {
    const decoder = new Decoder();
    decoder.#ort = ort;
    decoder.#manifest = manifest;
    decoder.#sessions = {};
    // States stay on the GPU between calls; only logits are read.
    const onGpu = providers.includes("webgpu");
    for (const name of ["decoder", "prefill"]) {
      const graph = manifest.graphs[name];
      decoder.#sessions[name] = await ort.InferenceSession.create(files[graph.file], {
        executionProviders: providers,
        logSeverityLevel: 3, // errors: a warning says that some nodes of small integers run on the CPU
        externalData: [{ path: "model.weights", data: files["model.weights"] }],
        preferredOutputLocation: onGpu
          ? Object.fromEntries(graph.outputs.map((t) => [t.name, t.name === "logits" ? "cpu" : "gpu-buffer"]))
          : undefined,
      });
    }
    decoder.#tables = decoder.#rotaryTables();
    decoder.chunk = manifest.graphs.prefill.inputs.find((t) => t.name === "input_ids").shape[1];
    decoder.reset();
    return decoder;
  }

  /** Forget the sequence. */
  reset() {
    for (const tensor of Object.values(this.#states ?? {})) tensor.dispose();
    this.#states = {};
    for (const { states } of Object.values(this.#manifest.graphs)) {
      for (const { name, dtype, shape } of states) this.#states[name] ??= this.#tensor(dtype, shape);
    }
    this.length = 0;
  }

  /** Tokens that there is still room for. */
  get room() {
    return this.#manifest.max_context - this.length;
  }

  /** Read tokens; gives the logits of the last one, a Float32Array. `report(read)` counts those of the prompt. */
  async read(ids, report = () => {}) {
    if (ids.length > this.room) {
      throw new Error(`The context has room for ${this.room} more tokens, and the text has ${ids.length}. Shorten it, or build with a larger --max-context.`);
    }
    const last = ids.length - 1; // prefill has no logits
    for (let start = 0; start < last; start += this.chunk) {
      const part = ids.slice(start, Math.min(last, start + this.chunk));
      await this.#run("prefill", part, this.chunk);
      report(start + part.length);
    }
    const { logits } = await this.#run("decoder", ids.slice(last), 1);
    return logits.data;
  }

  async #run(name, ids, T) {
    const { inputs, states, outputs } = this.#manifest.graphs[name];
    const padded = BigInt64Array.from({ length: T }, (_, at) => BigInt(ids[at] ?? 0));
    const controls = {
      input_ids: padded,
      length: Int32Array.of(this.length),
      commit: Int32Array.of(ids.length),
      accepted: Int32Array.of(0),
    };
    const feeds = {};
    for (const { name: input, dtype, shape } of inputs) {
      feeds[input] = this.#tables[input] ?? this.#states[input.endsWith(READ_AGAIN) ? input.slice(0, -READ_AGAIN.length) : input]
        ?? new this.#ort.Tensor(TYPES[dtype], controls[input], shape);
    }
    const wanted = outputs.map((t) => t.name).filter((output) => output === "logits" || states.some((state) => state.after === output));
    const results = await this.#sessions[name].run(feeds, wanted);
    for (const { name: state, after } of states) {
      this.#states[state].dispose();
      this.#states[state] = results[after];
    }
    this.length += ids.length;
    return results;
  }

  /** cos and sin of every position, as graphs read them: [rows, R/2], products in single precision. */
  #rotaryTables() {
    const { inv_freq: frequencies, scaling } = this.#manifest.rotary;
    const tables = {};
    for (const { name, dtype, shape } of this.#manifest.graphs.decoder.inputs.filter((t) => t.name === "cos" || t.name === "sin")) {
      if (dtype !== "float") throw new Error(`The bundle's tables are ${dtype}. Build it with --precision fp32 or int8.`);
      const values = new Float32Array(shape[0] * shape[1]);
      for (let row = 0; row < shape[0]; row++) {
        frequencies.forEach((frequency, at) => {
          values[row * shape[1] + at] = Math[name](Math.fround(row * Math.fround(frequency))) * scaling;
        });
      }
      tables[name] = new this.#ort.Tensor("float32", values, shape);
    }
    return tables;
  }

  #tensor(dtype, shape) {
    const size = shape.reduce((product, dim) => product * dim, 1);
    return new this.#ort.Tensor(TYPES[dtype], new ARRAYS[dtype](size), shape);
  }
}
