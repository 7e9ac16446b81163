"use strict";
// The whole model for a browser: model/model_vlm.py and model/model_minimind.py in plain JavaScript, for answers only.
//
//     pixels ── encoder ── P patch features ── projector ── P vectors of width D ─┐
//                                                                                 ▼ in place of placeholders
//     text ── ids ── embed_tokens ── hidden states ── decoder ── logits of the last token ── the next one
//
// Shapes: T tokens of this call, S tokens seen so far (cache included), D hidden_size, H query heads, K key/value heads,
// d width of a head, P placeholders of a picture, V the encoder's width, I inputs and O outputs of a layer. A matrix
// (T, D) is a Float32Array of T·D numbers, row by row.

// ---------------------------------------------------------------------------- weights, and products with them

const BYTES = {I8: 1, F16: 2, F32: 4};
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);

class Weights {
  /** file: the bytes of a safetensors file: fp16, or int8 beside "NAME.scale", a float for each row; kernel: those of
   * matmul.wasm, or null. With it they stay as small as they are, and are widened four rows at a time. */
  constructor(file, kernel) {
    const length = file.byteLength < 8 ? Infinity : Number(new DataView(file).getBigUint64(0, true));
    const header = 8 + length > file.byteLength ? "{}" : new TextDecoder().decode(new Uint8Array(file, 8, length));
    this.tensors = JSON.parse(header);
    const end = Math.max(...Object.values(this.tensors).map((tensor) => tensor.data_offsets[1]));
    if (8 + length + end !== file.byteLength) throw new Error("A part of the model is missing. Load the page again.");
    for (const tensor of Object.values(this.tensors)) tensor.at = 8 + length + tensor.data_offsets[0];
    this.buffer = file;
    this.floats = new Map();
    this.size = 16 * Math.ceil(file.byteLength / 16); // behind the weights is room for x, y and what is widened
    if (kernel) {
      this.memory = new WebAssembly.Memory({initial: Math.ceil(this.size / 65536)});
      new Uint8Array(this.memory.buffer).set(new Uint8Array(file));
      this.kernel = new WebAssembly.Instance(new WebAssembly.Module(kernel), {js: {memory: this.memory}}).exports;
      this.buffer = null;
    }
  }

  has(name) {
    return name in this.tensors;
  }

  /** Some rows of a tensor, else all, as Float32Array. */
  read(name, row = 0, rows = this.tensors[name].shape[0]) {
    const {dtype, shape, at} = this.tensors[name];
    const I = product(shape.slice(1)), from = at + row * I * BYTES[dtype];
    const bytes = (this.memory?.buffer ?? this.buffer).slice(from, from + rows * I * BYTES[dtype]);
    if (dtype === "F32") return new Float32Array(bytes);
    if (dtype === "F16") {
      // Sign, exponent and fraction go where float32 has them, times 2^112, as its exponents begin there.
      const bits = Uint32Array.from(new Int16Array(bytes), (half) => (half << 13) & 0x8fffe000);
      return new Float32Array(bits.buffer).map((number) => number * 2 ** 112);
    }
    const scales = this.read(`${name}.scale`, row, rows);
    return Float32Array.from(new Int8Array(bytes), (number, i) => number * scales[Math.floor(i / I)]);
  }

  /** All of a tensor, which is kept: vectors, and without the kernel all weights. */
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

  /** The product, in the open. */
  slow(name, x, T, I, O) {
    const y = new Float32Array(T * O), w = this.vector(name);
    for (let t = 0; t < T; t++) {
      for (let o = 0; o < O; o++) y[t * O + o] = dot(x, t * I, w, o * I, I);
    }
    return y;
  }

  /** The same by the kernel. */
  fast(name, x, T, I, O) {
    const {at, dtype} = this.tensors[name], bytes = BYTES[dtype], scales = this.tensors[`${name}.scale`]?.at ?? 0;
    const [input, wide, y] = this.room(T * I, 4 * I, T * O);
    new Float32Array(this.memory.buffer, input, T * I).set(x);
    this.kernel.matmul(input, 4 * I, at, bytes * I, bytes, scales, wide, y, T, I, O);
    return new Float32Array(this.memory.buffer, y, T * O).slice();
  }

  /** Addresses behind the weights for arrays of so many floats. */
  room(...lengths) {
    let end = this.size;
    const addresses = lengths.map((length) => (end += 16 * Math.ceil(length / 4)) - 16 * Math.ceil(length / 4));
    const missing = Math.ceil((end - this.memory.buffer.byteLength) / 65536);
    if (missing > 0) this.memory.grow(missing);
    return addresses;
  }

  /** What `attend` does, by the kernel. */
  attend(q, k, v, {H, K, d, T, S, causal, seen}) {
    if (!this.kernel || S < 4 || d % 8) return attend(q, k, v, {H, K, d, T, S, causal, seen});
    const [query, key, value, y, out] = this.room(T * H * d, S * K * d, S * K * d, T * S, T * H * d);
    const {buffer} = this.memory, scores = new Float32Array(buffer, y, T * S);
    for (const [at, x, n] of [[query, q, T * H * d], [key, k, S * K * d], [value, v, S * K * d]]) {
      new Float32Array(buffer, at, n).set(x.subarray(0, n));
    }
    for (let head = 0; head < H; head++) {
      const shared = 4 * d * Math.floor((head * K) / H);
      this.kernel.matmul(query + 4 * head * d, 4 * H * d, key + shared, 4 * K * d, 4, 0, 0, y, T, d, S);
      for (let t = 0; t < T; t++) {
        const n = causal ? S - T + t + 1 : S, row = scores.subarray(t * S, t * S + n);
        softmax(row, 1 / Math.sqrt(d));
        this.kernel.mix(y + 4 * t * S, value + shared, 4 * K * d, out + 4 * (t * H + head) * d, n, d);
        if (seen && t === T - 1) row.forEach((share, s) => (seen[s] += share / H));
      }
    }
    return new Float32Array(buffer, out, T * H * d).slice();
  }
}

// ---------------------------------------------------------------------------- what has no matrix

/** The sum of n products of a from i on and b from j on; four sums, as each has to wait for itself. */
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

/** x (T, D) + y, (T, D) too or the same (D) for all, in place. */
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

/** The same with the mean taken out before, and a bias. */
function layerNorm(x, weight, bias, eps) {
  const D = weight.length, centred = new Float32Array(x.length);
  for (let t = 0; t < x.length; t += D) {
    let sum = 0;
    for (let i = 0; i < D; i++) sum += x[t + i];
    for (let i = 0; i < D; i++) centred[t + i] = x[t + i] - sum / D;
  }
  return add(rmsNorm(centred, weight, eps), bias);
}

/** Any numbers, times `scale`, become positive ones of sum 1, in place. */
function softmax(x, scale = 1) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < x.length; i++) largest = Math.max(largest, x[i] * scale);
  for (let i = 0; i < x.length; i++) sum += x[i] = Math.exp(x[i] * scale - largest);
  for (let i = 0; i < x.length; i++) x[i] /= sum;
  return x;
}

/** The integral of the normal distribution, by which gelu is defined (Abramowitz & Stegun 7.1.26, to 1e-7). */
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

/** softmax(q·kᵀ/√d)·v for each head: q (T, H·d), k and v (S, K·d) → (T, H·d). Without `causal` all see all. seen: (S),
 * gets what the last of the T looks at, mean over heads. */
function attend(q, k, v, {H, K, d, T, S, causal, seen}) {
  const out = new Float32Array(T * H * d), weights = new Float32Array(S);
  for (let head = 0; head < H; head++) {
    const at = Math.floor((head * K) / H) * d; // H heads of queries share K heads of keys and values
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

// ---------------------------------------------------------------------------- the model

class MiniMindV {
  /** config: what model/web.py writes; weights: ArrayBuffer of a safetensors file; kernel: Uint8Array or null. */
  static async load({config, weights, kernel}) {
    return new MiniMindV(config, new Weights(weights, kernel));
  }

  constructor(config, weights) {
    Object.assign(this, {config, weights});
  }

  // -------------------------------------------------------------------------- pictures

  /** pixels uint8 (3, H, W), as `resize` gives them → what the encoder makes of the patches, (patches, V). */
  see(pixels) {
    const {encoder, processor} = this.config, w = this.weights, name = "vision_model";
    const {patch_size: p, image_size: edge, hidden_size: V, layer_norm_eps: eps} = encoder, side = Math.floor(edge / p);
    const norm = (x, layer) => layerNorm(x, w.vector(`${layer}.weight`), w.vector(`${layer}.bias`), eps);
    const patches = new Float32Array(side * side * 3 * p * p); // each a row of numbers of mean 0 and spread 1
    for (let i = 0, patch = 0; patch < side * side; patch++) {
      const top = Math.floor(patch / side) * p, left = (patch % side) * p;
      for (let c = 0; c < 3; c++) {
        const [mean, std] = [processor.image_mean[c], processor.image_std[c]];
        for (let y = top; y < top + p; y++) {
          for (let x = left; x < left + p; x++) patches[i++] = (pixels[(c * edge + y) * edge + x] / 255 - mean) / std;
        }
      }
    }
    const embedded = w.linear(`${name}.embeddings.patch_embedding`, patches);
    const first = w.has(`${name}.embeddings.class_embedding`) ? V : 0; // CLIP has a summary before the patches
    let h = new Float32Array(first + embedded.length); // (T, V)
    h.set(embedded, first);
    if (first) h.set(w.vector(`${name}.embeddings.class_embedding`));
    add(h, w.vector(`${name}.embeddings.position_embedding.weight`));
    if (w.has(`${name}.pre_layrnorm.weight`)) h = norm(h, `${name}.pre_layrnorm`);
    const H = encoder.num_attention_heads, T = h.length / V;
    for (let i = 0; i < encoder.num_hidden_layers; i++) {
      const layer = `${name}.encoder.layers.${i}`, normed = norm(h, `${layer}.layer_norm1`);
      const [q, k, v] = ["q", "k", "v"].map((part) => w.linear(`${layer}.self_attn.${part}_proj`, normed));
      add(h, w.linear(`${layer}.self_attn.out_proj`, w.attend(q, k, v, {H, K: H, d: V / H, T, S: T})));
      const inner = w.linear(`${layer}.mlp.fc1`, norm(h, `${layer}.layer_norm2`)).map(ACTIVATIONS[encoder.hidden_act]);
      add(h, w.linear(`${layer}.mlp.fc2`, inner));
    }
    if (w.has(`${name}.post_layernorm.weight`)) h = norm(h, `${name}.post_layernorm`);
    return h.slice(first);
  }

  /** features (patches, V) → (P, D): as wide as words. */
  project(features) {
    const w = this.weights, {spatial_merge_size: S, ve_hidden_size: V} = this.config.decoder;
    if (S > 1) {
      const side = Math.sqrt(features.length / V), patches = features, blocks = side / S;
      features = new Float32Array(patches.length); // (P, S²·V): the patches of a block one after the other
      for (let i = 0; i < side * side; i++) {
        const [block, inside] = [Math.floor(i / S ** 2), i % S ** 2];
        const y = Math.floor(block / blocks) * S + Math.floor(inside / S), x = (block % blocks) * S + (inside % S);
        features.set(patches.subarray((y * side + x) * V, (y * side + x + 1) * V), i * V);
      }
    }
    if (!w.has("vision_proj.mlp.1.weight")) return w.linear("vision_proj.vision_proj.0", features);
    const [weight, bias] = ["weight", "bias"].map((part) => w.vector(`vision_proj.mlp.0.${part}`));
    const inner = w.linear("vision_proj.mlp.1", layerNorm(features, weight, bias, 1e-5)).map(ACTIVATIONS.gelu);
    return w.linear("vision_proj.mlp.3", inner);
  }

  /** Where in ids pictures begin: in a run of L placeholders the first L // P · P belong to some. */
  findPictures(ids) {
    const {placeholder, P} = this.config.decoder, begins = [];
    for (let t = 0, run = 0; t < ids.length; t++) {
      run = ids[t] === placeholder ? run + 1 : 0;
      if (run === P) begins.push(t - P + 1);
      run %= P;
    }
    return begins;
  }

  // -------------------------------------------------------------------------- the decoder

  /** Keys and values of the tokens so far, `ids`. To go back to n tokens: `cache.ids.length = n`. */
  newCache() {
    const layers = Array.from({length: this.config.decoder.num_hidden_layers}, () => ({k: new Float32Array(0), v: new Float32Array(0)}));
    return {ids: [], layers};
  }

  /** The next T ids → logits of what follows them (vocab_size). features: `see` of each picture that begins in them.
   * seen: a list that gets, from each layer, what the last token looks at (S). */
  forward(ids, features, cache, seen = null) {
    const {decoder} = this.config, w = this.weights, D = decoder.hidden_size, T = ids.length, past = cache.ids.length;
    const wrong = ids.find((id) => !(id >= 0 && id < decoder.vocab_size));
    if (wrong !== undefined) throw new Error(`The model has no token ${wrong}. Its tokenizer is another one.`);
    if (past + T > decoder.max_position_embeddings) {
      throw new Error(`${past + T} tokens are more than the ${decoder.max_position_embeddings} that the model reads. Start a new chat.`);
    }
    const h = new Float32Array(T * D);
    ids.forEach((id, t) => h.set(w.read("model.embed_tokens.weight", id, 1), t * D));
    const begins = this.findPictures(ids);
    if (begins.length !== (features ?? []).length) {
      throw new Error(`The text has places for ${begins.length} pictures, and there are ${(features ?? []).length}.`);
    }
    begins.forEach((t, i) => h.set(this.project(features[i]), t * D)); // to the decoder P ordinary tokens
    const norm = (x, name) => rmsNorm(x, w.vector(`${name}.weight`), decoder.rms_norm_eps);
    for (let i = 0; i < decoder.num_hidden_layers; i++) {
      const layer = `model.layers.${i}`;
      add(h, this.attention(`${layer}.self_attn`, norm(h, `${layer}.input_layernorm`), cache.layers[i], past, seen));
      const normed = norm(h, `${layer}.post_attention_layernorm`);
      add(h, decoder.use_moe ? this.experts(`${layer}.mlp`, normed) : this.feedForward(`${layer}.mlp`, normed));
    }
    cache.ids.push(...ids);
    return w.linear("model.embed_tokens", norm(h.subarray((T - 1) * D), "model.norm")); // the head is the same matrix
  }

  /** x (T, D) → (T, D); the layer's cache gets the keys and values. */
  attention(name, x, cache, past, seen) {
    const {num_attention_heads: H, num_key_value_heads: K, head_dim: d, rms_norm_eps: eps} = this.config.decoder;
    const w = this.weights;
    let [q, k, v] = ["q", "k", "v"].map((part) => w.linear(`${name}.${part}_proj`, x)); // (T, H·d), (T, K·d) twice
    if (w.has(`${name}.q_norm.weight`)) {
      [q, k] = [[q, "q"], [k, "k"]].map(([part, of]) => rmsNorm(part, w.vector(`${name}.${of}_norm.weight`), eps));
    }
    const T = q.length / (H * d), S = past + T, room = cache.k.length;
    for (const [part, heads] of [[q, H], [k, K]]) this.rotate(part, heads, d, past);
    for (const [key, part] of [["k", k], ["v", v]]) {
      if (S * K * d > room) {
        const longer = new Float32Array(2 * S * K * d);
        longer.set(cache[key].subarray(0, past * K * d));
        cache[key] = longer;
      }
      cache[key].set(part, past * K * d);
    }
    const looked = seen && new Float32Array(S);
    if (seen) seen.push(looked);
    return w.linear(`${name}.o_proj`, w.attend(q, cache.k, cache.v, {H, K, d, T, S, causal: true, seen: looked}));
  }

  /** RoPE: entries i and i + d/2 of each head of x (T, heads·d) turn by position · theta^(-2i/d), in place. */
  rotate(x, heads, d, past) {
    const theta = this.config.decoder.rope_theta;
    for (let i = 0; i < d / 2; i++) {
      const frequency = Math.fround(1 / Math.fround(theta ** Math.fround((2 * i) / d))); // as precise as PyTorch's
      for (let t = 0; t * heads * d < x.length; t++) {
        const angle = Math.fround((past + t) * frequency), cos = Math.cos(angle), sin = Math.sin(angle);
        for (let head = 0; head < heads; head++) {
          const a = (t * heads + head) * d + i, b = a + d / 2, first = x[a], second = x[b];
          x[a] = first * cos - second * sin;
          x[b] = second * cos + first * sin;
        }
      }
    }
  }

  /** SwiGLU: down(silu(gate(x)) · up(x)), (T, D) → (T, D). */
  feedForward(name, x) {
    const act = ACTIVATIONS[this.config.decoder.hidden_act];
    const gate = this.weights.linear(`${name}.gate_proj`, x), up = this.weights.linear(`${name}.up_proj`, x);
    for (let i = 0; i < up.length; i++) up[i] *= act(gate[i]);
    return this.weights.linear(`${name}.down_proj`, up);
  }

  /** Each token by the k of E feed-forwards that the gate chooses, and by the shared ones: (T, D) → (T, D). */
  experts(name, x) {
    const {n_routed_experts: E, num_experts_per_tok: k, n_shared_experts: shared, normed, hidden_size: D} = this.config.decoder;
    const scores = this.weights.linear(`${name}.gate`, x), y = new Float32Array(x.length); // (T, E)
    const turns = Array.from({length: E}, () => []); // of each expert: [token, how much it counts]
    for (let t = 0; t * D < x.length; t++) {
      const row = softmax(scores.subarray(t * E, (t + 1) * E));
      const chosen = Array.from(row.keys()).sort((a, b) => row[b] - row[a]).slice(0, k);
      const sum = normed ? chosen.reduce((total, expert) => total + row[expert], 1e-20) : 1;
      for (const expert of chosen) turns[expert].push([t, row[expert] / sum]);
    }
    turns.forEach((tokens, expert) => {
      if (!tokens.length) return;
      const own = new Float32Array(tokens.length * D);
      tokens.forEach(([t], i) => own.set(x.subarray(t * D, (t + 1) * D), i * D));
      const out = this.feedForward(`${name}.experts.${expert}`, own);
      tokens.forEach(([t, weight], i) => {
        for (let j = 0; j < D; j++) y[t * D + j] += weight * out[i * D + j];
      });
    });
    for (let i = 0; i < shared; i++) add(y, this.feedForward(`${name}.shared_experts.${i}`, x));
    return y;
  }

  // -------------------------------------------------------------------------- a chat

  /** A question of the page, with a place for each of its pictures, as `user_turn` in inference/generate.py. */
  userTurn(text, pictures) {
    const {tag, pictures_first: first} = this.config.chat, tags = text.split(tag).length - 1;
    if (tags && tags !== pictures) throw new Error(`The text has ${tags} ${tag}, and there are ${pictures} pictures.`);
    if (tags || !pictures) return text;
    return first || pictures > 1 ? `${tag}\n`.repeat(pictures) + text : `${text}\n${tag}`;
  }

  /** [{role, content}], "<image>" in user turns → {ids, pictures}, as `encode_chat` in model/processing.py: what people
   * typed is plain text, and a conversation that ends with the user ends ready to answer. */
  encodeChat(turns, tokenizer) {
    const {placeholder, P} = this.config.decoder, {tag, system, no_thought: noThought} = this.config.chat;
    const [start, end] = [tokenizer.ids.get("<|im_start|>"), tokenizer.ids.get("<|im_end|>")];
    const sign = tokenizer.tokens[placeholder], typed = sign.length === 1; // as "@" is: people type it too
    const text = (string) => tokenizer.encode(string), image = Array(P).fill(placeholder), ids = [];
    if (system && turns[0]?.role !== "system") turns = [{role: "system", content: system}, ...turns];
    let pictures = 0;
    for (const {role, content} of turns) {
      const parts = role === "user" ? content.split(tag) : [content];
      const runs = (typed && parts.join(sign.repeat(P)).split(sign.repeat(P)).length) || parts.length;
      if (runs !== parts.length) {
        throw new Error(`The text has ${P} or more ${sign} in a row, as a picture has. Shorten the run.`);
      }
      pictures += parts.length - 1;
      if (role === "assistant") {
        ids.push(...text(noThought ? afterThoughts(content) : content), end, ...text("\n"));
        continue;
      }
      ids.push(start);
      if (typed) ids.push(...text(`${role}\n${parts.join(sign.repeat(P))}`));
      else [`${role}\n${parts[0]}`, ...parts.slice(1)].forEach((part, i) => ids.push(...(i ? image : []), ...text(part)));
      ids.push(end, ...text("\n"));
      if (role === "user") ids.push(start, ...text("assistant\n"));
    }
    if (noThought && turns.at(-1)?.role === "user") ids.push(...text(noThought));
    return {ids, pictures};
  }

  /** Yields the tokens of an answer, one by one, up to <|im_end|> or max_new_tokens. */
  *generate(ids, features, cache, {max_new_tokens, random = Math.random, ...sampling}) {
    let logits = this.forward(ids, features, cache);
    for (let n = 1; ; n++) {
      const token = this.sample(logits, sampling, random);
      yield token;
      if (n >= max_new_tokens || token === this.config.decoder.eos_token_id) return;
      logits = this.forward([token], [], cache); // pictures and all before are in the cache
    }
  }

  /** Draws a token: the likeliest at temperature 0, else one of the likeliest that together have the share top_p. */
  sample(logits, {temperature = 0, top_p = 1, top_k = 0}, random) {
    if (!temperature) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
    const shares = softmax(logits.map((logit) => logit / temperature));
    const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, top_k || shares.length);
    let kept = 0, n = 0;
    while (n < order.length && kept < top_p) kept += shares[order[n++]];
    let left = random() * kept;
    return order.slice(0, n).find((token) => (left -= shares[token]) < 0) ?? order[0];
  }
}

/** An answer of MiniMind-3 as it learned it: with its thought before, mostly an empty one. */
function afterThoughts(content) {
  const cut = content.lastIndexOf("</think>"), said = cut < 0 ? content : content.slice(cut + 8);
  const thought = content.slice(0, Math.max(cut, 0)).split("</think>")[0].split("<think>").at(-1).replace(/^\n+|\n+$/g, "");
  return `<think>\n${thought}\n</think>\n\n${said.replace(/^\n+/, "")}`;
}

/** What an answer says, without what MiniMind-3 may write in <think> before. */
function withoutThoughts(text) {
  return text.replace(/<think>[^]*?(<\/think>|$)/g, "").trim();
}
