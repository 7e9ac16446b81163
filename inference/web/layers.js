"use strict";
// The parts of a model: weights and products with them, norms, activations, attention. engine.js puts them together.
//
// Shapes: T tokens of this call, S tokens seen so far, D width, I inputs and O outputs of a layer, H query heads,
// K key/value heads, d width of a head. A matrix (T, D) is a Float32Array of T·D numbers, row by row.

// ---------------------------------------------------------------------------- weights

const BYTES = {I8: 1, F16: 2, F32: 4};
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

/** Returns {buffer} for a file of so many bytes: the memory of the kernel, so that weights exist once, in their stored
 * precision. kernel: Uint8Array of matmul.wasm, or null; browsers without SIMD do not use it. */
function memoryFor(bytes, kernel) {
  const fits = kernel && globalThis.WebAssembly?.validate(kernel);
  return fits ? new WebAssembly.Memory({initial: Math.ceil(bytes / 65536)}) : {buffer: new ArrayBuffer(bytes)};
}

class Weights {
  /** memory: from `memoryFor`, with a safetensors file in it: fp16, or int8 with "NAME.scale", one float per row. */
  constructor(memory, kernel) {
    const file = memory.buffer, length = Number(new DataView(file).getBigUint64(0, true));
    this.tensors = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, length))); // name → dtype, shape, where
    for (const tensor of Object.values(this.tensors)) tensor.at = 8 + length + tensor.data_offsets[0];
    [this.memory, this.floats] = [memory, new Map()];
    this.size = file.byteLength; // the space after the weights is for x, y and widened rows
    if (!memory.grow) return;
    this.kernel = new WebAssembly.Instance(new WebAssembly.Module(kernel), {js: {memory}}).exports;
  }

  has(name) {
    return name in this.tensors;
  }

  /** Returns some rows of a tensor, by default all, as Float32Array. */
  read(name, row = 0, rows = this.tensors[name].shape[0]) {
    const {dtype, shape, at} = this.tensors[name];
    const I = product(shape.slice(1)), from = at + row * I * BYTES[dtype];
    const bytes = this.memory.buffer.slice(from, from + rows * I * BYTES[dtype]);
    if (dtype === "F32") return new Float32Array(bytes);
    if (dtype === "F16") {
      // Sign, exponent and fraction move to where float32 has them; 2^112 is the difference of the exponent biases.
      const bits = Uint32Array.from(new Int16Array(bytes), (half) => (half << 13) & 0x8fffe000);
      return new Float32Array(bits.buffer).map((number) => number * 2 ** 112);
    }
    const scales = this.read(`${name}.scale`, row, rows);
    return Float32Array.from(new Int8Array(bytes), (number, i) => number * scales[Math.floor(i / I)]);
  }

  /** Returns a whole tensor and keeps it: used for vectors, and without the kernel for all weights. */
  vector(name) {
    if (!this.floats.has(name)) this.floats.set(name, this.read(name));
    return this.floats.get(name);
  }

  /** The layer `name`: x (T, I) → x · weightᵀ + bias (T, O). */
  linear(name, x) {
    const {shape} = this.tensors[`${name}.weight`];
    const O = shape[0], I = product(shape.slice(1)), T = x.length / I;
    const fits = this.kernel && O >= 4 && I % 4 === 0;
    const y = fits ? this.fast(`${name}.weight`, x, T, I, O) : this.slow(`${name}.weight`, x, T, I, O);
    return this.has(`${name}.bias`) ? add(y, this.vector(`${name}.bias`)) : y;
  }

  /** The product in plain JavaScript. */
  slow(name, x, T, I, O) {
    const y = new Float32Array(T * O), w = this.vector(name);
    for (let t = 0; t < T; t++) {
      for (let o = 0; o < O; o++) y[t * O + o] = dot(x, t * I, w, o * I, I);
    }
    return y;
  }

  /** The same with the kernel. */
  fast(name, x, T, I, O) {
    const {at, dtype} = this.tensors[name], bytes = BYTES[dtype], scales = this.tensors[`${name}.scale`]?.at ?? 0;
    const [input, wide, y] = this.room(T * I, 4 * I, T * O);
    new Float32Array(this.memory.buffer, input, T * I).set(x);
    this.kernel.matmul(input, 4 * I, at, bytes * I, bytes, scales, wide, y, T, I, O);
    return new Float32Array(this.memory.buffer, y, T * O).slice();
  }

  /** Returns addresses after the weights for arrays of so many floats; grows the memory if needed. */
  room(...lengths) {
    let end = this.size;
    const addresses = lengths.map((length) => (end += 16 * Math.ceil(length / 4)) - 16 * Math.ceil(length / 4));
    const missing = Math.ceil((end - this.memory.buffer.byteLength) / 65536);
    if (missing > 0) this.memory.grow(missing);
    return addresses;
  }

  /** The same as the function `attend`, with the kernel. */
  attend(q, k, v, {H, K, d, T, S, causal, seen}) {
    if (!this.kernel || S < 4 || d % 8) return attend(q, k, v, {H, K, d, T, S, causal, seen});
    const rows = 32; // of queries at a time: the scores of all queries of a long text would take too much memory
    const [query, key, value, y, out] = this.room(T * H * d, S * K * d, S * K * d, rows * S, T * H * d);
    const {buffer} = this.memory, scores = new Float32Array(buffer, y, rows * S);
    for (const [at, x, n] of [[query, q, T * H * d], [key, k, S * K * d], [value, v, S * K * d]]) {
      new Float32Array(buffer, at, n).set(x.subarray(0, n));
    }
    for (let head = 0; head < H; head++) {
      const shared = 4 * d * Math.floor((head * K) / H);
      for (let t = 0; t < T; t++) {
        const first = t - (t % rows), last = Math.min(first + rows, T), visible = causal ? S - T + t + 1 : S;
        const n = causal ? Math.max(S - T + last, 4) : S; // keys that the last of these queries sees
        const from = query + 4 * (t * H + head) * d;
        if (t === first) this.kernel.matmul(from, 4 * H * d, key + shared, 4 * K * d, 4, 0, 0, y, last - t, d, n);
        const at = (t - first) * n, row = softmax(scores.subarray(at, at + visible), 1 / Math.sqrt(d));
        this.kernel.mix(y + 4 * at, value + shared, 4 * K * d, out + 4 * (t * H + head) * d, visible, d);
        if (seen && t === T - 1) row.forEach((share, s) => (seen[s] += share / H));
      }
    }
    return new Float32Array(buffer, out, T * H * d).slice();
  }
}

// ---------------------------------------------------------------------------- functions without weights

/** Dot product of n numbers of a from i and of b from j. Uses four sums, since an addition waits for the one before. */
function dot(a, i, b, j, n) {
  let [s0, s1, s2, s3] = [0, 0, 0, 0];
  const end = i + n - (n % 4);
  for (; i < end; i += 4, j += 4) {
    s0 += a[i] * b[j];
    s1 += a[i + 1] * b[j + 1];
    s2 += a[i + 2] * b[j + 2];
    s3 += a[i + 3] * b[j + 3];
  }
  for (let rest = n % 4; rest > 0; rest--) s0 += a[i++] * b[j++];
  return s0 + s1 + s2 + s3;
}

/** Adds y, which is (T, D) or one row (D) for all, to x (T, D) in place. */
function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i % y.length];
  return x;
}

/** x (T, D) → (T, D): x / sqrt(mean(x²) + eps) · weight. */
function rmsNorm(x, weight, eps) {
  const D = weight.length, y = new Float32Array(x.length);
  for (let t = 0; t < x.length; t += D) {
    let squares = 0;
    for (let i = 0; i < D; i++) squares += x[t + i] ** 2;
    const by = 1 / Math.sqrt(squares / D + eps);
    for (let i = 0; i < D; i++) y[t + i] = x[t + i] * by * weight[i];
  }
  return y;
}

/** The same after subtracting the mean, and with a bias. */
function layerNorm(x, weight, bias, eps) {
  const D = weight.length, centred = new Float32Array(x.length);
  for (let t = 0; t < x.length; t += D) {
    let sum = 0;
    for (let i = 0; i < D; i++) sum += x[t + i];
    for (let i = 0; i < D; i++) centred[t + i] = x[t + i] - sum / D;
  }
  return add(rmsNorm(centred, weight, eps), bias);
}

/** Turns numbers, times `scale`, into positive ones with sum 1, in place. */
function softmax(x, scale = 1) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) largest = Math.max(largest, x[i] * scale);
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] * scale - largest);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

/** The cumulative normal distribution, which defines gelu (Abramowitz & Stegun 7.1.26, to 1e-7). */
function normal(x) {
  const t = 1 / (1 + (0.3275911 * Math.abs(x)) / Math.SQRT2);
  const sum = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
  const tail = (sum * Math.exp((-x * x) / 2)) / 2;
  return x < 0 ? tail : 1 - tail;
}

const ACTIVATIONS = {
  silu: (x) => x / (1 + Math.exp(-x)),
  relu: (x) => Math.max(x, 0),
  gelu: (x) => x * normal(x),
  quick_gelu: (x) => x / (1 + Math.exp(-1.702 * x)),
  gelu_pytorch_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

/** softmax(q·kᵀ/√d)·v for each head: q (T, H·d), k and v (S, K·d) → (T, H·d). Without `causal` all see all. seen:
 * (S), receives the attention of the last of the T tokens, mean over heads. */
function attend(q, k, v, {H, K, d, T, S, causal, seen}) {
  const out = new Float32Array(T * H * d), weights = new Float32Array(S);
  for (let head = 0; head < H; head++) {
    const at = Math.floor((head * K) / H) * d; // H query heads share K key/value heads
    for (let t = 0; t < T; t++) {
      const n = causal ? S - T + t + 1 : S, query = (t * H + head) * d; // no token sees a later one
      const row = weights.subarray(0, n);
      for (let s = 0; s < n; s++) row[s] = dot(q, query, k, s * K * d + at, d);
      softmax(row, 1 / Math.sqrt(d));
      for (let s = 0; s < n; s++) {
        for (let i = 0, value = s * K * d + at; i < d; i++) out[query + i] += row[s] * v[value + i];
        if (seen && t === T - 1) seen[s] += row[s] / H;
      }
    }
  }
  return out;
}
