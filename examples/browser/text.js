// Text to tokens and back, with the files of the bundle: tokenizer.json and the checkpoint's chat template.

import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

const OPTIONS = { skip_special_tokens: true, clean_up_tokenization_spaces: false };
const decodeUtf8 = (bytes) => new TextDecoder().decode(bytes);

export class Text {
  #tokenizer;
  #template;

  constructor(files) {
    const [tokenizer, config] = ["tokenizer.json", "tokenizer_config.json"].map((name) => JSON.parse(decodeUtf8(files[name] ?? new Uint8Array([123, 125]))));
    this.#tokenizer = new Tokenizer(tokenizer, config);
    this.#template = files["chat_template.jinja"] && new Template(decodeUtf8(files["chat_template.jinja"]));
  }

  get chats() {
    return this.#template !== undefined;
  }

  /** Token ids of a prompt: of messages {role, content} through the template, of a string as it is. */
  encode(prompt, thinking) {
    const text = typeof prompt === "string" ? prompt : this.#template.render({ messages: prompt, add_generation_prompt: true, enable_thinking: thinking });
    return this.#tokenizer.encode(text, { add_special_tokens: false }).ids;
  }

  /** A function that takes the next token and gives the text that it completes: a character may have several tokens. */
  stream() {
    const ids = [];
    let first = 0; // where decoding begins: some tokens before the new ones, for what depends on them
    let seen = 0;
    return (id) => {
      ids.push(id);
      const decode = (stop) => (stop > first ? this.#tokenizer.decode(ids.slice(first, stop), OPTIONS) : "");
      const [before, after] = [decode(seen), decode(ids.length)];
      if (after.length <= before.length || after.endsWith("\uFFFD")) return "";
      [first, seen] = [seen, ids.length];
      return after.slice(before.length);
    };
  }
}
