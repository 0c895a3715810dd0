// What the events of an answer add to its message, and the figures below it.

export class AnswerState {
  constructor(message) {
    this.message = message;
    this.first = 0;
    this.last = 0;
    this.tokens = 0;
  }

  take(event) {
    const { message } = this;
    this.first ||= performance.now();
    if (event.reasoning) message.reasoning_content = (message.reasoning_content ?? "") + event.reasoning;
    if (event.content) message.content += event.content;
    if (event.finish) message.finish = event.finish;
    if (event.usage) this.tokens = event.usage.completion_tokens ?? 0;
    else this.last = performance.now();
    if (event.call) this.takeCall(event.call);
  }

  takeCall(piece) {
    const calls = (this.message.tool_calls ??= []);
    const call = (calls[piece.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= piece.id ?? "";
    call.function.name ||= piece.name ?? "";
    call.function.arguments += piece.arguments;
  }

  figures() {
    if (!this.tokens) return "";
    const seconds = (this.last - this.first) / 1000;
    const speed = this.tokens > 1 && seconds > 0.05 ? `, ${((this.tokens - 1) / seconds).toFixed(1)} a second` : "";
    return `${this.tokens} token${this.tokens === 1 ? "" : "s"}${speed}`;
  }
}

export function isEmpty(message) {
  return message.role === "assistant" && !message.content && !message.reasoning_content && !message.tool_calls?.length;
}
