// The dialog of settings.

import { byId, element } from "./elements.js";
import { DEFAULTS } from "./store.js";

export function toolsOf(text) {
  // The tools of a request; null where the text is not a list of them.
  if (!text.trim()) return [];
  try {
    const tools = JSON.parse(text);
    return Array.isArray(tools) && tools.every((tool) => tool && typeof tool === "object" && !Array.isArray(tool)) ? tools : null;
  } catch {
    return null;
  }
}

export function openSettings({ settings, key, models }, { save, deleteAll }) {
  const dialog = byId("settings");
  if (dialog.open) return;
  const form = byId("settings-form");
  const fields = form.elements;
  byId("model-row").hidden = models.length < 2;
  fields.model.replaceChildren(...models.map((model) => element("option", { value: model.id, textContent: model.id })));
  for (const name of Object.keys(DEFAULTS)) fields[name].value = settings[name];
  if (fields.model.selectedIndex < 0) fields.model.selectedIndex = 0;
  fields.key.value = key;
  toolsProblem("");

  form.onsubmit = (event) => {
    event.preventDefault();
    if (toolsOf(fields.tools.value) === null) {
      toolsProblem("This is not a JSON list of tools.");
      fields.tools.focus();
      return;
    }
    const wrong = [fields.temperature, fields.max_tokens].find((field) => !field.checkValidity());
    if (wrong) {
      wrong.reportValidity();
      return;
    }
    const changed = Object.fromEntries(Object.keys(DEFAULTS).map((name) => [name, fields[name].value]));
    if (models.length < 2) changed.model = settings.model;
    save(changed, fields.key.value.trim());
    dialog.close();
  };
  byId("cancel-settings").onclick = () => dialog.close();
  byId("delete-all").onclick = () => {
    if (!confirm("Delete all conversations of this browser?")) return;
    deleteAll();
    dialog.close();
  };
  // A field that keeps the focus behind a dialog would not take keys afterwards.
  const before = document.activeElement;
  before?.blur();
  dialog.onclose = () => before?.focus();
  dialog.showModal();

  function toolsProblem(text) {
    byId("tools-problem").textContent = text;
    byId("tools-problem").hidden = !text;
    fields.tools.setAttribute("aria-invalid", String(Boolean(text)));
  }
}
