// The text within a block of Markdown to a list of nodes: text, code, strong, em, del, link, break.

const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /^https?:\/\/[^\s<>"`]*[^\s<>"`.,:;!?'*_~)\]}]/;
const AUTOLINK = /^<((?:https?:\/\/|mailto:)[^\s<>]*)>/;
const TARGET = /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()\\]|\\.|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/;
const LONGEST_LABEL = 2000; // characters of a link's text that are searched for its end
const MOST_MARKS = 2000; // marks of emphasis in one block; what is behind them is text

export function parseInline(text, links = true) {
  const nodes = [];
  let plain = "";
  let at = 0;
  let marks = 0;
  const unclosed = new Set();

  function push(node) {
    if (plain) nodes.push({ type: "text", text: plain });
    plain = "";
    nodes.push(node);
  }

  while (at < text.length) {
    const char = text[at];
    const rest = () => text.slice(at, at + 4000);
    let match;
    if (char === "\\" && text[at + 1] === "\n") {
      push({ type: "break" });
      at += 2;
    } else if (char === "\\" && PUNCTUATION.test(text[at + 1] || "")) {
      plain += text[at + 1];
      at += 2;
    } else if (char === "\n") {
      const hard = /  +$/.test(plain);
      plain = plain.replace(/ +$/, "");
      if (hard) push({ type: "break" });
      else plain += "\n";
      at += 1;
    } else if (char === "`") {
      const [code, next] = readCode(text, at, unclosed);
      if (code === null) plain += text.slice(at, next);
      else push({ type: "code", text: code });
      at = next;
    } else if (char === "<" && links && (match = AUTOLINK.exec(rest()))) {
      push(link(match[1], [{ type: "text", text: match[1] }], match[0]));
      at += match[0].length;
    } else if (char === "h" && links && !/\w/.test(text[at - 1] || "") && (match = ADDRESS.exec(rest()))) {
      push(link(match[0], [{ type: "text", text: match[0] }], match[0]));
      at += match[0].length;
    } else if (links && (char === "[" || (char === "!" && text[at + 1] === "[")) && (match = readLink(text, at))) {
      push(match.node);
      at = match.end;
    } else if ((char === "*" || char === "_" || char === "~") && marks < MOST_MARKS) {
      let end = at;
      while (text[end] === char) end += 1;
      push(mark(text, at, end));
      marks += 1;
      at = end;
    } else {
      plain += char;
      at += 1;
    }
  }
  if (plain) nodes.push({ type: "text", text: plain });
  return withEmphasis(nodes);
}

function readCode(text, at, unclosed) {
  // A run of backticks closes at the next run of the same length. Returns null and the end of the run where there is none.
  let end = at;
  while (text[end] === "`") end += 1;
  const ticks = end - at;
  if (!unclosed.has(ticks)) {
    for (let from = end; from < text.length; ) {
      const found = text.indexOf("`", from);
      if (found < 0) break;
      let behind = found;
      while (text[behind] === "`") behind += 1;
      if (behind - found === ticks) {
        const code = text.slice(end, found).replace(/\n/g, " ");
        const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "";
        return [padded ? code.slice(1, -1) : code, behind];
      }
      from = behind;
    }
    unclosed.add(ticks);
  }
  return [null, end];
}

function readLink(text, at) {
  // [label](address), or an image, which becomes a link: the page loads nothing from elsewhere.
  const start = at + (text[at] === "!" ? 2 : 1);
  let depth = 1;
  let end = start;
  const limit = Math.min(text.length, start + LONGEST_LABEL);
  for (; end < limit && depth; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]") depth -= 1;
  }
  const target = depth ? null : TARGET.exec(text.slice(end, end + 4000));
  if (!target) return null;
  const address = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  const label = text.slice(start, end - 1);
  const whole = text.slice(at, end + target[0].length);
  const inner = label ? parseInline(label, false) : [{ type: "text", text: address }];
  return { node: link(address, inner, whole), end: end + target[0].length };
}

function link(address, inner, whole) {
  // Addresses of other kinds, such as javascript:, are shown as they were written.
  let url = null;
  try {
    url = new URL(address);
  } catch {
    url = null;
  }
  const known = url && ["http:", "https:", "mailto:"].includes(url.protocol);
  return known ? { type: "link", href: url.href, inner } : { type: "text", text: whole };
}

function mark(text, at, end) {
  // Marks open where text follows, and close where text is before; within words underscores do neither.
  const before = at ? text[at - 1] : " ";
  const after = end < text.length ? text[end] : " ";
  const spaceBefore = /\s/.test(before);
  const spaceAfter = /\s/.test(after);
  const signBefore = isSign(before);
  const signAfter = isSign(after);
  const left = !spaceAfter && (!signAfter || spaceBefore || signBefore);
  const right = !spaceBefore && (!signBefore || spaceAfter || signAfter);
  const char = text[at];
  const opens = char === "_" ? left && (!right || signBefore) : left;
  const closes = char === "_" ? right && (!left || signAfter) : right;
  return { type: "mark", char, count: end - at, length: end - at, opens, closes };
}

function isSign(char) {
  return /[\p{P}\p{S}]/u.test(char);
}

function withEmphasis(nodes) {
  // Pairs of marks become emphasis, from the inside out. `bottom`: below it there is no opening mark of a kind.
  const bottom = {};
  for (let close = 0; close < nodes.length; close += 1) {
    const closing = nodes[close];
    if (closing.type !== "mark" || !closing.closes || !closing.count) continue;
    const kind = `${closing.char}${closing.opens}${closing.length % 3}`;
    let open = close - 1;
    while (open >= (bottom[kind] ?? 0) && !pairs(nodes[open], closing)) open -= 1;
    if (open < (bottom[kind] ?? 0)) {
      bottom[kind] = close;
      continue;
    }
    const opening = nodes[open];
    const strong = opening.count > 1 && closing.count > 1;
    const taken = closing.char === "~" ? opening.count : strong ? 2 : 1;
    opening.count -= taken;
    closing.count -= taken;
    const inner = merged(nodes.slice(open + 1, close).map(asText));
    const type = closing.char === "~" ? "del" : strong ? "strong" : "em";
    nodes.splice(open + 1, close - open - 1, { type, inner });
    close = closing.count ? open + 1 : open + 2;
    for (const key of Object.keys(bottom)) bottom[key] = Math.min(bottom[key], open);
  }
  return merged(nodes.map(asText));
}

function pairs(node, closing) {
  if (node.type !== "mark" || node.char !== closing.char || !node.opens || !node.count) return false;
  if (closing.char === "~") return node.count === closing.count && node.count <= 2;
  const odd = (node.closes || closing.opens) && (node.length + closing.length) % 3 === 0;
  return !odd || (node.length % 3 === 0 && closing.length % 3 === 0);
}

function asText(node) {
  return node.type === "mark" ? { type: "text", text: node.char.repeat(node.count) } : node;
}

function merged(nodes) {
  const result = [];
  for (const node of nodes) {
    const last = result[result.length - 1];
    if (node.type === "text" && last && last.type === "text") last.text += node.text;
    else if (node.type !== "text" || node.text) result.push({ ...node });
  }
  return result;
}
