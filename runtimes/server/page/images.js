// Images that are attached to a question, as data: addresses.

import { byId, element } from "./elements.js";

const LONGEST_SIDE = 2048;
const LARGEST = 1 << 20; // bytes of a file that is sent as it is

async function readImage(file) {
  // Large images are made smaller. Raises for a file that is no image.
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= LARGEST) return asAddress(file);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.9);
}

function asAddress(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

export class Attachments {
  // The images below the question that is being written. `problem` shows a message.
  constructor(problem) {
    this.problem = problem;
    this.urls = [];
  }

  async add(files) {
    for (const file of files) {
      try {
        this.urls.push(await readImage(file));
      } catch {
        this.problem(`${file.name} is not an image that this browser can read.`);
      }
    }
    this.show();
  }

  take() {
    // As parts of a message; none are left.
    const parts = this.urls.map((url) => ({ type: "image_url", image_url: { url } }));
    this.urls = [];
    this.show();
    return parts;
  }

  show() {
    const list = byId("attachments");
    list.hidden = !this.urls.length;
    list.replaceChildren(
      ...this.urls.map((url, i) => {
        const remove = element("button", { type: "button", className: "quiet", textContent: "Remove" });
        remove.setAttribute("aria-label", `Remove image ${i + 1}`);
        remove.addEventListener("click", () => {
          this.urls.splice(i, 1);
          this.show();
          byId("question").focus();
        });
        return element("li", {}, [element("img", { src: url, alt: `Image ${i + 1}` }), remove]);
      }),
    );
  }
}
