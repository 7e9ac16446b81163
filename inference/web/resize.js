"use strict";
// A picture → what the encoder sees, to the bit as `ImageProcessor.resize` (model/processing.py) with PyTorch makes it.

/** Filters (Keys 1981): how much a pixel counts at a distance x of the new one, and up to which distance any does. */
const FILTERS = {
  2: [(x) => Math.max(1 - x, 0), 1], // bilinear
  3: [(x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0), 2], // bicubic
};

/** For each of `to` pixels out of `from`: where in them it begins, and the weights from there, as integers; and the
 * number of their binary places. Smaller pictures are means over more pixels: the filter is stretched. */
function filterOf(from, to, resample) {
  const [weigh, reach] = FILTERS[resample];
  const scale = from / to, stretch = Math.max(scale, 1), support = reach * stretch;
  const filter = [];
  let largest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    const begin = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = [];
    for (let j = begin; j < end; j++) weights.push(weigh(Math.abs((j - centre + 0.5) * (1 / stretch))));
    const sum = weights.reduce((a, b) => a + b, 0);
    for (let j = 0; j < weights.length; j++) largest = Math.max(largest, (weights[j] /= sum));
    filter.push({begin, weights});
  }
  let places = 0; // as many as 16 bits have room for
  while (places < 22 && Math.trunc(0.5 + largest * 2 ** (places + 1)) < 2 ** 15) places++;
  const rounded = (weight) => Math.trunc(weight * 2 ** places + Math.sign(weight) * 0.5);
  for (const row of filter) row.weights = Int32Array.from(row.weights, rounded);
  return {filter, places};
}

/** uint8 (3, H, W) → (3, H, to): all rows; or, by its strides, all columns → (3, to, W). */
function scale(pixels, height, width, to, resample, vertical) {
  const [from, others] = vertical ? [height, width] : [width, height];
  if (from === to) return pixels;
  const {filter, places} = filterOf(from, to, resample);
  const out = new Uint8Array(3 * others * to), half = 1 << (places - 1);
  const [step, next, put] = vertical ? [width, 1, width] : [1, width, 1]; // between pixels of a line, lines, results
  for (let c = 0; c < 3; c++) {
    for (let i = 0; i < to; i++) {
      const {begin, weights} = filter[i];
      for (let line = 0; line < others; line++) {
        let sum = half, at = c * height * width + line * next + begin * step;
        for (let j = 0; j < weights.length; j++, at += step) sum += weights[j] * pixels[at];
        out[c * others * to + line * (vertical ? 1 : to) + i * put] = Math.min(Math.max(sum >> places, 0), 255);
      }
    }
  }
  return out;
}

/** Uint8ClampedArray (height, width, 4), what is transparent on white, → Uint8Array (3, H, W).
 * settings: of ImageProcessor; size: the shortest edge, or [height, width] to squash to; crop_size: [H, W]. */
function resize(rgba, width, height, {size, crop_size, resample}) {
  let left = 0, top = 0;
  const stride = width;
  if (!Array.isArray(size)) {
    const short = Math.min(width, height); // a line of a picture: the crop leaves only its middle
    [left, top] = [width, height].map((edge) => Math.floor(Math.max(edge - 100 * short, 0) / 2));
    [width, height] = [width - 2 * left, height - 2 * top];
  }
  let pixels = new Uint8Array(3 * height * width);
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      const at = 4 * ((y + top) * stride + x + left), alpha = rgba[at + 3];
      for (let c = 0; c < 3; c++) {
        const mixed = 128 * (rgba[at + c] * alpha + 255 * (255 - alpha) + 128); // 128 · 255 times the colour on white
        pixels[c * height * width + i] = (mixed + (mixed >> 8)) >> 15;
      }
    }
  }
  const long = Math.floor((size * Math.max(width, height)) / Math.min(width, height));
  const [H, W] = Array.isArray(size) ? size : width <= height ? [long, size] : [size, long];
  pixels = scale(pixels, height, width, W, resample, false); // (3, height, W)
  pixels = scale(pixels, height, W, H, resample, true); // (3, H, W)
  const [rows, columns] = crop_size, cropped = new Uint8Array(3 * rows * columns); // what lies outside is black
  [top, left] = [Math.floor((H - rows) / 2), Math.floor((W - columns) / 2)];
  for (let c = 0, i = 0; c < 3; c++) {
    for (let y = top; y < top + rows; y++) {
      for (let x = left; x < left + columns; x++, i++) {
        if (y >= 0 && y < H && x >= 0 && x < W) cropped[i] = pixels[(c * H + y) * W + x];
      }
    }
  }
  return cropped;
}
