"use strict";
// Shows where the decoder looked when it chose a word: it lights the pictures there, like inference/attention.py.

const EDGE = 224; // pixels of such a picture

/** Returns the part of a picture that the model sees, as ImageProcessor crops it: [left, top, width, height]. */
function seenPart({width, height}) {
  const {size, crop_size: crop} = config.processor, scale = Math.min(width, height) / size;
  if (Array.isArray(size)) return [0, 0, width, height]; // squashed as a whole
  const [w, h] = [Math.min(width, crop[1] * scale), Math.min(height, crop[0] * scale)];
  return [(width - w) / 2, (height - h) / 2, w, h];
}

/** Draws a picture in colour where heat (side, side) is 1, dark where it is 0. */
function spotlight({view}, heat, side) {
  const canvas = drawn(view, EDGE, EDGE, seenPart(view)), context = canvas.getContext("2d");
  const image = context.getImageData(0, 0, EDGE, EDGE), {data} = image;
  const places = Array.from({length: EDGE}, (_, x) => { // the patches to interpolate between
    const at = Math.min(Math.max(((x + 0.5) * side) / EDGE - 0.5, 0), side - 1), low = Math.floor(at);
    return [low, Math.min(low + 1, side - 1), at - low];
  });
  for (let i = 0; i < data.length; i += 4) {
    const [left, right, u] = places[(i / 4) % EDGE], [top, bottom, v] = places[Math.floor(i / 4 / EDGE)];
    const across = (row) => heat[row * side + left] * (1 - u) + heat[row * side + right] * u;
    const light = across(top) * (1 - v) + across(bottom) * v, grey = 0.35 * (data[i] + data[i + 1] + data[i + 2]) / 3;
    for (let c = i; c < i + 3; c++) data[c] = data[c] * light + grey * (1 - light);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Shows the worker's maps (side, side) for a word of the last answer, one for each picture. */
function showLook(turn, {word, side, maps}) {
  const n = turn.words.findIndex(({begin}) => begin === word.begin);
  const all = maps.flatMap((map) => [...map]), most = Math.max(...all), share = all.reduce((a, b) => a + b);
  const views = maps.map((map, i) => asPicture(spotlight(turn.read[i], map.map((heat) => heat / most), side), i));
  const button = (label, textContent, onclick) => make("button", {label, textContent, onclick});
  const step = (label, sign, to) => button(label, sign, () => turn.words[to] && look(turn, to, label));
  const close = button("close", "×", () => (closeLook(turn), turn.about.querySelector("button").focus()));
  const caption = make("output", {say: "looked", values: {word: word.text, share: `${Math.round(100 * share)}%`}});
  const below = make("figcaption", {}, step("before", "‹", n - 1), caption, step("after", "›", n + 1), close);
  turn.figure.replaceChildren(make("div", {className: "row"}, ...views), below);
  turn.figure.hidden = false;
  turn.said.querySelectorAll("span").forEach((span, i) => span.classList.toggle("chosen", i === n));
  turn.figure.querySelector(`[data-label=${turn.step}]`)?.focus();
  turn.figure.scrollIntoView({block: "nearest"});
}

/** Asks the worker about word n. step: the button, previous or next word, that gets the focus again. */
function look(turn, n, step) {
  if (turn !== turns.at(-1) || answering || !turn.read.length) return;
  turn.step = step;
  worker.postMessage({type: "look", token: turn.words[n].tokens[0]});
}

function closeLook(turn) {
  turn.figure.hidden = true;
  for (const span of turn.said.querySelectorAll(".chosen")) span.classList.remove("chosen");
}
