"use strict";
// Turns files into thumbnails that wait for the next question.

let waiting = [], added = 0; // pictures of the next question; number of pictures so far
let coming = 0, andSend = false; // additions in progress; whether to send the question after them
let kept = []; // ids of the pictures that the worker still has

/** Returns a canvas of this size with the part `from` (left, top, width, height) of a picture. In CPU memory: a GPU may
 * return other bits, and takes longer. */
function drawn(picture, width, height, from = [0, 0, picture.width, picture.height]) {
  const canvas = make("canvas", {width, height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, ...from, 0, 0, width, height);
  return canvas;
}

/** Draws the picture of a file in at most so many pixels, for display. */
async function drawnFile(blob, most) {
  const bitmap = await createImageBitmap(blob), scale = Math.min(1, Math.sqrt(most / bitmap.width / bitmap.height));
  const canvas = drawn(bitmap, ...[bitmap.width, bitmap.height].map((edge) => Math.max(1, Math.floor(edge * scale))));
  bitmap.close(); // frees its memory now
  return canvas;
}

async function add(files) {
  tell(by("told"), "");
  coming++;
  for (const blob of files) {
    try {
      waiting.push({id: ++added, blob, view: await drawnFile(blob, 9 * EDGE * EDGE)});
    } catch {
      andSend = false;
      tell(by("told"), "broken", {name: blob.name});
    }
  }
  coming--;
  showWaiting();
  if (andSend && !coming) send();
}

const shown = ({view}, n) => asPicture(drawn(view, view.width, view.height), n);

function asPicture(canvas, n) {
  canvas.setAttribute("role", "img");
  tell(canvas, "picture", {n: n + 1}, "label");
  return canvas;
}

function showWaiting() {
  const thumbnail = (picture, n) => {
    const remove = () => (waiting.splice(n, 1), showWaiting(), box.focus());
    const button = make("button", {type: "button", label: "remove", onclick: remove});
    button.append(by("cross").content.cloneNode(true));
    return make("div", {}, shown(picture, n), button);
  };
  by("waiting").replaceChildren(...waiting.map(thumbnail));
  by("waiting").hidden = !waiting.length;
}
