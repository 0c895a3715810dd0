// The list of conversations in the sidebar.

import { byId, element } from "./elements.js";

export function showConversations(conversations, currentId, { open, remove }) {
  byId("conversations").replaceChildren(
    ...conversations.map((conversation) => {
      const title = element("button", { type: "button", className: "title", textContent: conversation.title });
      if (conversation.id === currentId) title.setAttribute("aria-current", "true");
      title.addEventListener("click", () => open(conversation));
      const cross = element("button", { type: "button", className: "icon remove", textContent: "×" });
      cross.setAttribute("aria-label", `Delete “${conversation.title}”`);
      cross.addEventListener("click", () => remove(conversation));
      return element("li", {}, [title, cross]);
    }),
  );
}
