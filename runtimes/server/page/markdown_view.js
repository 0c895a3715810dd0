// Elements for the tree of `markdown.js`. Text of a model reaches the document through `textContent` alone.

import { parseMarkdown } from "./markdown.js";
import { copyText, element } from "./elements.js";

export class MarkdownView {
  // Shows a text that grows: blocks that are as before stay in place, with what is selected in them.
  constructor(root) {
    this.root = root;
    this.shown = [];
  }

  update(text) {
    const blocks = parseMarkdown(text);
    let same = 0;
    while (same < blocks.length && same < this.shown.length && blocks[same].raw === this.shown[same]) same += 1;
    while (this.root.children.length > same) this.root.lastElementChild.remove();
    for (const block of blocks.slice(same)) this.root.append(blockElement(block));
    this.shown = blocks.map((block) => block.raw);
  }
}

function blockElement(block) {
  switch (block.type) {
    case "heading":
      // The page's own heading is the first.
      return element(`h${Math.min(block.level + 2, 6)}`, {}, inlineNodes(block.inline));
    case "code":
      return codeElement(block);
    case "quote":
      return element("blockquote", {}, block.blocks.map(blockElement));
    case "rule":
      return element("hr");
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, inlineNodes(block.inline));
  }
}

function listElement(block) {
  const items = block.items.map((blocks) => {
    const tight = !block.loose && blocks.length && blocks[0].type === "paragraph";
    const first = tight ? inlineNodes(blocks[0].inline) : [];
    return element("li", {}, [...first, ...blocks.slice(tight ? 1 : 0).map(blockElement)]);
  });
  const list = element(block.ordered ? "ol" : "ul", {}, items);
  if (block.ordered && block.start !== 1) list.start = block.start;
  return list;
}

function tableElement(block) {
  const cell = (name) => (inline, column) => {
    const made = element(name, { className: `align-${block.align[column]}` }, inlineNodes(inline));
    if (name === "th") made.scope = "col";
    return made;
  };
  const head = element("thead", {}, [element("tr", {}, block.head.map(cell("th")))]);
  const body = element("tbody", {}, block.rows.map((row) => element("tr", {}, row.map(cell("td")))));
  // A wide table is scrolled by itself, with the keyboard too.
  const region = element("div", { className: "table", tabIndex: 0 }, [element("table", {}, [head, body])]);
  region.setAttribute("role", "region");
  region.setAttribute("aria-label", "Table");
  return region;
}

function codeElement(block) {
  const copy = element("button", { type: "button", className: "quiet copy", textContent: "Copy" });
  copy.setAttribute("aria-label", block.language ? `Copy the ${block.language} code` : "Copy the code");
  copy.addEventListener("click", () => copyText(block.text, copy));
  const bar = element("div", { className: "bar" }, [element("span", { textContent: block.language || "text" }), copy]);
  const code = element("code", { textContent: block.text });
  const pre = element("pre", { tabIndex: 0 }, [code]);
  return element("div", { className: "code" }, [bar, pre]);
}

function inlineNodes(nodes) {
  return nodes.map((node) => {
    switch (node.type) {
      case "code":
        return element("code", { textContent: node.text });
      case "break":
        return element("br");
      case "link": {
        const link = element("a", { href: node.href, target: "_blank", rel: "noopener noreferrer" }, inlineNodes(node.inner));
        link.title = node.href;
        return link;
      }
      case "strong":
      case "em":
      case "del":
        return element(node.type, {}, inlineNodes(node.inner));
      default:
        return document.createTextNode(node.text);
    }
  });
}
