// One message of the log: a question, an answer with its reasoning and calls, or the result of a call.

import { copyText, element } from "./elements.js";
import { MarkdownView } from "./markdown_view.js";

export function textOf(message) {
  if (typeof message.content === "string") return message.content;
  return (message.content ?? []).filter((part) => part.type === "text").map((part) => part.text).join("");
}

export class MessageView {
  constructor(message) {
    this.message = message;
    this.root = element("article", { className: `turn ${message.role}` });
    this.root.setAttribute("aria-label", { user: "You", tool: "Result of a call" }[message.role] ?? "Answer");
    if (message.role === "assistant") this.buildAnswer();
    else this.buildText();
  }

  buildText() {
    const { message } = this;
    if (message.role === "tool") this.root.append(element("p", { className: "label", textContent: "result" }));
    this.root.append(element("div", { className: "text", textContent: textOf(message) }));
    for (const part of Array.isArray(message.content) ? message.content : []) {
      const url = part.image_url?.url ?? "";
      if (url.startsWith("data:image/")) this.root.append(element("img", { src: url, alt: "Attached image" }));
    }
  }

  buildAnswer() {
    this.reasoning = element("div", { className: "reasoning-text" });
    this.summary = element("summary", { textContent: "Reasoning" });
    this.details = element("details", { hidden: true }, [this.summary, this.reasoning]);
    this.text = element("div", { className: "markdown" });
    this.calls = element("div", { className: "calls" });
    this.foot = element("div", { className: "foot" });
    this.root.append(this.details, this.text, this.calls, this.foot);
    this.markdown = new MarkdownView(this.text);
    this.update(false);
  }

  update(running) {
    // Draw what the message has by now.
    const { message } = this;
    this.root.setAttribute("aria-busy", String(running));
    this.root.classList.toggle("running", running);
    if (message.reasoning_content) {
      this.details.hidden = false;
      this.reasoning.textContent = message.reasoning_content;
      const open = running && !message.content && !message.tool_calls?.length;
      this.summary.textContent = open ? "Reasoning …" : "Reasoning";
    }
    this.markdown.update(message.content ?? "");
    this.calls.replaceChildren(...(message.tool_calls ?? []).map(callElement));
    this.foot.replaceChildren(...(running ? [] : this.footElements()));
  }

  footElements() {
    const { message } = this;
    const parts = [];
    if (message.content) {
      const copy = element("button", { type: "button", className: "quiet", textContent: "Copy" });
      copy.setAttribute("aria-label", "Copy the answer");
      copy.addEventListener("click", () => copyText(message.content, copy));
      parts.push(copy);
    }
    if (this.again) {
      const again = element("button", { type: "button", className: "quiet", textContent: "Answer again" });
      again.addEventListener("click", this.again);
      parts.push(again);
    }
    if (message.problem) parts.push(element("span", { className: "problem", textContent: message.problem }));
    if (message.figures) parts.push(element("span", { textContent: message.figures }));
    return parts;
  }
}

function callElement(call) {
  let shown = call.function.arguments;
  try {
    shown = JSON.stringify(JSON.parse(shown), null, 2);
  } catch {
    // Not complete: as it is.
  }
  const name = element("p", { className: "label" }, ["calls ", element("code", { textContent: call.function.name })]);
  const box = element("div", { className: "call" }, [name, element("pre", { tabIndex: 0 }, [element("code", { textContent: shown })])]);
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", `Call of ${call.function.name}`);
  return box;
}
