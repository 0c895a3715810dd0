// Markdown to a tree of plain objects. Knows nothing of the document: `markdown_view.js` makes elements of the tree.
//
// Blocks: paragraph, heading, code, list, quote, table, rule. Each top-level block has `raw`, its lines, by which a view knows it again.

import { parseInline } from "./markdown_inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const UNDERLINE = /^ {0,3}(=+|-+)[ \t]*$/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 12; // blocks within blocks; what is deeper is text

export function parseMarkdown(text) {
  return parseBlocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function parseBlocks(lines, depth) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, next] = depth < DEEPEST ? readBlock(lines, at, depth) : readParagraph(lines, at);
    block.raw = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, inline: parseInline(heading[2] || "") }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (QUOTE.test(line)) return readQuote(lines, at, depth);
  if (ITEM.test(line)) return readList(lines, at, depth);
  if (startsTable(lines, at)) return readTable(lines, at);
  if (/^ {4}/.test(line)) return readIndented(lines, at);
  return readParagraph(lines, at);
}

function isBlank(line) {
  return line.trim() === "";
}

function startsBlock(lines, at) {
  // Whether a line ends the paragraph before it. A numbered list does so only where it begins with 1.
  const line = lines[at];
  const item = ITEM.exec(line);
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || startsTable(lines, at) ||
    Boolean(item && item[3] && !isBlank(line.slice(item[0].length)) && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1))
  );
}

function readFence(lines, at, fence) {
  const closing = new RegExp(`^ {0,3}\\${fence[2][0]}{${fence[2].length},}[ \\t]*$`);
  const indent = new RegExp(`^ {0,${fence[1].length}}`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.replace(indent, "")).join("\n");
  const language = fence[3].trim().split(/\s+/)[0] || "";
  return [{ type: "code", language, text }, Math.min(end + 1, lines.length)];
}

function readIndented(lines, at) {
  let end = at;
  while (end < lines.length && (isBlank(lines[end]) || /^ {4}/.test(lines[end]))) end += 1;
  while (isBlank(lines[end - 1])) end -= 1;
  return [{ type: "code", language: "", text: lines.slice(at, end).map((line) => line.slice(4)).join("\n") }, end];
}

function readQuote(lines, at, depth) {
  const inner = [];
  let end = at;
  while (end < lines.length) {
    if (QUOTE.test(lines[end])) inner.push(lines[end].replace(QUOTE, ""));
    else if (isBlank(lines[end]) || isBlank(inner[inner.length - 1]) || startsBlock(lines, end)) break;
    else inner.push(lines[end]);
    end += 1;
  }
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const items = [];
  let end = at;
  let loose = false;
  while (end < lines.length) {
    const mark = ITEM.exec(lines[end]);
    if (!mark || RULE.test(lines[end]) || mark[2].slice(-1) !== first[2].slice(-1)) break;
    const text = lines[end].slice(mark[0].length);
    // Text begins behind the mark; five spaces or more behind it are code.
    const width = mark[1].length + mark[2].length + (mark[3].length > 4 || isBlank(text) ? 1 : mark[3].length);
    const inner = [lines[end].slice(width)];
    end += 1;
    while (end < lines.length) {
      const line = lines[end];
      if (isBlank(line)) inner.push("");
      else if (/^ */.exec(line)[0].length >= width) inner.push(line.slice(width));
      else if (isBlank(inner[inner.length - 1]) || ITEM.test(line) || startsBlock(lines, end)) break;
      else inner.push(line.trimStart());
      end += 1;
    }
    let blanks = 0;
    while (inner.length > 1 && isBlank(inner[inner.length - 1])) {
      inner.pop();
      blanks += 1;
    }
    const more = end < lines.length && ITEM.test(lines[end]);
    loose = loose || (blanks > 0 && more);
    items.push(parseBlocks(inner, depth + 1));
    if (blanks && !more) {
      end -= blanks;
      break;
    }
  }
  return [{ type: "list", ordered, start: ordered ? parseInt(first[2], 10) : 1, loose, items }, end];
}

function startsTable(lines, at) {
  const next = lines[at + 1];
  if (next === undefined || !lines[at].includes("|") || !next.includes("-") || !DELIMITERS.test(next)) return false;
  return cellsOf(lines[at]).length === cellsOf(next).length;
}

function cellsOf(line) {
  const cells = line.trim().replace(/^\|/, "").replace(/\\\|/g, "\0").split("|");
  if (cells.length > 1 && isBlank(cells[cells.length - 1])) cells.pop();
  return cells.map((cell) => cell.trim().replace(/\0/g, "|"));
}

function readTable(lines, at) {
  const head = cellsOf(lines[at]);
  const align = cellsOf(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !startsBlock(lines, end)) {
    const cells = cellsOf(lines[end]);
    rows.push(head.map((_, column) => parseInline(cells[column] || "")));
    end += 1;
  }
  return [{ type: "table", align, head: head.map(parseInline), rows }, end];
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end])) {
    const underline = UNDERLINE.exec(lines[end]);
    if (underline) {
      const level = underline[1][0] === "=" ? 1 : 2;
      return [{ type: "heading", level, inline: parseInline(joined(lines.slice(at, end))) }, end + 1];
    }
    if (startsBlock(lines, end)) break;
    end += 1;
  }
  return [{ type: "paragraph", inline: parseInline(joined(lines.slice(at, end))) }, end];
}

function joined(lines) {
  return lines.map((line) => line.trimStart()).join("\n").trimEnd();
}
