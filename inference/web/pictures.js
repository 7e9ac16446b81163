"use strict";
// From files to thumbnails that wait for a question.

let waiting = [], added = 0; // pictures that go with the next question; how many there have been
let coming = 0, andSend = false; // additions under way; whether their question has been sent already
let kept = []; // ids of those that the worker still has

/** A canvas of this size with what stands at `from`, (left, top, width, height) of a picture, in it. In the memory of
 * the processor: that of a graphics card may give other bits back, and takes longer. */
function drawn(picture, width, height, from = [0, 0, picture.width, picture.height]) {
  const canvas = make("canvas", {width, height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, ...from, 0, 0, width, height);
  return canvas;
}

/** A picture of a file, in at most so many pixels, to look at. */
async function drawnFile(blob, most) {
  const bitmap = await createImageBitmap(blob), scale = Math.min(1, Math.sqrt(most / bitmap.width / bitmap.height));
  const canvas = drawn(bitmap, ...[bitmap.width, bitmap.height].map((edge) => Math.max(1, Math.floor(edge * scale))));
  bitmap.close(); // its memory goes now, not some time
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
