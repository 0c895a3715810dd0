// Small helpers over the document.

export function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

export function say(text) {
  // For screen readers. The same text twice is read twice.
  const status = byId("status");
  status.textContent = "";
  setTimeout(() => (status.textContent = text), 50);
}

export async function copyText(text, button) {
  // `navigator.clipboard` is there for https and localhost alone.
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = element("textarea", { value: text, className: "unseen", readOnly: true });
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.dataset.label || button.textContent;
  button.dataset.label = label;
  button.textContent = done ? "Copied" : "Not copied";
  say(button.textContent);
  setTimeout(() => (button.textContent = label), 1500);
}
