"use strict";
// Resizes a picture for the encoder, bit for bit like `ImageProcessor.resize` (model/processing.py) with PyTorch.

/** Filters (Keys 1981): the weight of a pixel at distance x from the new one, and the largest distance that counts. */
const FILTERS = {
  2: [(x) => Math.max(1 - x, 0), 1], // bilinear
  3: [(x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0), 2], // bicubic
};

/** For each of `to` pixels made of `from`: the first pixel that counts, and the weights from there on as integers; and
 * the number of their binary places. When a picture shrinks, the filter is stretched to average over more pixels. */
function filterOf(from, to, resample) {
  const [weigh, reach] = FILTERS[resample];
  const scale = from / to, stretch = Math.max(scale, 1), support = reach * stretch;
  const begins = [], rows = [];
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5), end = Math.min(Math.trunc(centre + support + 0.5), from), row = [];
    begins.push(Math.max(Math.trunc(centre - support + 0.5), 0));
    for (let j = begins[i]; j < end; j++) row.push(weigh(Math.abs((j - centre + 0.5) * (1 / stretch))));
    const sum = row.reduce((a, b) => a + b, 0);
    rows.push(row.map((weight) => weight / sum));
  }
  const largest = rows.reduce((most, row) => Math.max(most, ...row), 0);
  let places = 0; // as many as fit into 16 bits
  while (places < 22 && Math.trunc(0.5 + largest * 2 ** (places + 1)) < 2 ** 15) places++;
  const rounded = (weight) => Math.trunc(weight * 2 ** places + Math.sign(weight) * 0.5);
  return {begins, weights: rows.map((row) => Int32Array.from(row, rounded)), places};
}

/** Returns the i-th new pixel of a line of uint8 from `at` on, in steps of `step`, for an array that clamps. */
function pixelOf({begins, weights, places}, i, line, at, step) {
  const row = weights[i];
  let sum = 1 << (places - 1); // rounds to the nearest
  for (let j = 0, k = at + begins[i] * step; j < row.length; j++, k += step) sum += row[j] * line[k];
  return sum >> places;
}

/** Puts the transparent parts of a line of pixels (width, 4) on white. */
function onWhite(line) {
  let opaque = 255;
  for (let i = 3; i < line.length; i += 4) opaque &= line[i];
  if (opaque === 255) return line;
  return line.map((level, i) => {
    const alpha = line[i | 3], mixed = 128 * (level * alpha + 255 * (255 - alpha) + 128); // 128 · 255 times the colour
    return (mixed + (mixed >> 8)) >> 15;
  });
}

/** A picture → Uint8ClampedArray (3, rows, columns). lineOf: y → line (width, 4), called from top to bottom.
 * settings: of ImageProcessor; size: the shortest edge, or [H, W] to squash to; crop_size: [rows, columns]. */
function resize(lineOf, width, height, {size, crop_size: [rows, columns], resample}) {
  let left = 0, top = 0, [H, W] = Array.isArray(size) ? size : [size, size];
  if (!Array.isArray(size)) {
    const short = Math.min(width, height); // of a very long picture the crop leaves only the middle
    [left, top] = [width, height].map((edge) => Math.floor(Math.max(edge - 100 * short, 0) / 2));
    [width, height] = [width - 2 * left, height - 2 * top];
    const long = Math.floor((size * Math.max(width, height)) / Math.min(width, height));
    [H, W] = width <= height ? [long, size] : [size, long];
  }
  const across = filterOf(width, W, resample), down = filterOf(height, H, resample);
  const [above, before] = [Math.floor((H - rows) / 2), Math.floor((W - columns) / 2)]; // of the crop, or less than 0
  const narrow = new Uint8ClampedArray(3 * height * columns); // what lies outside is black
  for (let y = 0; y < height; y++) {
    const line = onWhite(lineOf(y + top).subarray(4 * left, 4 * (left + width)));
    for (let c = 0; c < 3; c++) {
      for (let x = Math.max(before, 0); x < Math.min(before + columns, W); x++) {
        narrow[(c * height + y) * columns + x - before] = pixelOf(across, x, line, c, 4);
      }
    }
  }
  const pixels = new Uint8ClampedArray(3 * rows * columns);
  for (let c = 0; c < 3; c++) {
    for (let y = Math.max(above, 0); y < Math.min(above + rows, H); y++) {
      for (let x = 0; x < columns; x++) {
        pixels[(c * rows + y - above) * columns + x] = pixelOf(down, y, narrow, c * height * columns + x, columns);
      }
    }
  }
  return pixels;
}

// ---------------------------------------------------------------------------- the lines of a picture

const linesIn = (rgba, width) => (y) => rgba.subarray(4 * width * y, 4 * width * (y + 1));

/** Decodes a file upright, with its stored colours and alpha: Pillow does no colour management either. */
async function decode(blob) {
  const asStored = {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none"};
  return createImageBitmap(blob, asStored).catch(() => createImageBitmap(blob)); // older browsers lack "from-image"
}

/** Returns the lines of a bitmap, read a few at a time: all of twelve megapixels would take 48 MB more. */
function linesOf(bitmap) {
  const {width} = bitmap, rows = 64; // in CPU memory: a GPU may return other bits
  const context = new OffscreenCanvas(width, rows).getContext("2d", {willReadFrequently: true});
  let first = -rows, lines = null;
  return (y) => {
    if (y >= first + rows) {
      first = y;
      context.clearRect(0, 0, width, rows);
      context.drawImage(bitmap, 0, -first);
      lines = linesIn(context.getImageData(0, 0, width, rows).data, width);
    }
    return lines(y - first);
  };
}
