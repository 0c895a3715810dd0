// A form for the results of the calls of an answer: the page runs no functions, the person gives what they return.

import { element } from "./elements.js";

export function resultsForm(calls, send) {
  const fields = calls.map((call) => {
    const area = element("textarea", { rows: 2, required: true });
    return { call, area, label: element("label", {}, [`Result of ${call.function.name} `, area]) };
  });
  const form = element("form", { className: "results" }, [
    ...fields.map((field) => field.label),
    element("button", { type: "submit", textContent: fields.length > 1 ? "Send the results" : "Send the result" }),
  ]);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    send(fields.map(({ call, area }) => ({ role: "tool", tool_call_id: call.id, content: area.value })));
  });
  return form;
}
