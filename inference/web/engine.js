"use strict";
// The whole model for a browser: model/model_vlm.py and model/model_minimind.py in plain JavaScript, inference only.
//
//     pixels ── encoder ── P patch features ── projector ── P vectors of width D ─┐
//                                                                                 ▼ in place of placeholders
//     text ── ids ── embed_tokens ── hidden states ── decoder ── logits of the last token ── the next one
//
// Shapes: T tokens of this call, S tokens seen so far (cache included), D hidden_size, H query heads, K key/value
// heads, d width of a head, P placeholders of a picture, V the encoder's width, E experts. A matrix (T, D) is a
// Float32Array of T·D numbers, row by row.

class MiniMindV {
  /** config: what model/web.py writes; weights: see layers.js. */
  constructor(config, weights) {
    Object.assign(this, {config, weights});
  }

  // -------------------------------------------------------------------------- pictures

  /** The encoder: pixels uint8 (3, height, width) from `resize` → features of the patches (patches, V). */
  see(pixels) {
    const {encoder, processor, decoder} = this.config, w = this.weights;
    const {patch_size: p, hidden_size: V, num_attention_heads: H, layer_norm_eps: eps} = encoder;
    const [, width] = processor.crop_size, height = pixels.length / 3 / width, patches = [];
    for (let top = 0; top + p <= height; top += p) {
      for (let left = 0; left + p <= width; left += p) patches.push([top, left]);
    }
    const x = new Float32Array(patches.length * 3 * p * p); // a row of normalized pixels for each patch
    let n = 0;
    for (const [top, left] of patches) {
      for (let c = 0; c < 3; c++) {
        const [mean, std] = [processor.image_mean[c], processor.image_std[c]];
        for (let i = 0; i < p * p; i++) {
          const at = (c * height + top + Math.floor(i / p)) * width + left + (i % p);
          x[n++] = (pixels[at] / 255 - mean) / std;
        }
      }
    }
    const norm = (h, name) => layerNorm(h, w.vector(`${name}.weight`), w.vector(`${name}.bias`), eps);
    const scaled = (y, name) => { // LayerScale, which DINOv2 has
      const scale = w.has(name) ? w.vector(name) : [];
      return scale.length ? y.map((number, i) => number * scale[i % V]) : y;
    };
    let h = w.vector("encoder.positions").slice(); // (T, V), with a class token or registers before the patches
    add(h.subarray(h.length - patches.length * V), w.linear("encoder.patches", x));
    if (w.has("encoder.pre_norm.weight")) h = norm(h, "encoder.pre_norm");
    for (let i = 0; i < encoder.num_hidden_layers; i++) {
      const layer = `encoder.layers.${i}`, normed = norm(h, `${layer}.norm1`), T = h.length / V;
      const [q, k, v] = ["q", "k", "v"].map((part) => w.linear(`${layer}.${part}_proj`, normed));
      const seen = w.attend(q, k, v, {H, K: H, d: V / H, T, S: T});
      add(h, scaled(w.linear(`${layer}.o_proj`, seen), `${layer}.layer_scale1`));
      const inner = w.linear(`${layer}.fc1`, norm(h, `${layer}.norm2`)).map(ACTIVATIONS[encoder.hidden_act]);
      add(h, scaled(w.linear(`${layer}.fc2`, inner), `${layer}.layer_scale2`));
    }
    if (w.has("encoder.norm.weight")) h = norm(h, "encoder.norm");
    return h.slice(h.length - decoder.P * decoder.spatial_merge_size ** 2 * V); // without a class token
  }

  /** The projector: features (patches, V) → (P, D), as wide as the embeddings of tokens. */
  project(features) {
    const w = this.weights, {spatial_merge_size: S, ve_hidden_size: V} = this.config.decoder;
    if (S > 1) {
      const side = Math.sqrt(features.length / V), patches = features, blocks = side / S;
      features = new Float32Array(patches.length); // (P, S²·V): the patches of a block in one row
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

  /** Returns where in ids pictures begin. In a run of L placeholders the first floor(L / P) · P belong to pictures. */
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

  /** A cache for the keys and values of the tokens so far, `ids`. To go back to n tokens: `cache.ids.length = n`. */
  newCache() {
    const empty = () => ({k: new Float32Array(0), v: new Float32Array(0)}); // (S, K·d), and room for more
    return {ids: [], layers: Array.from({length: this.config.decoder.num_hidden_layers}, empty)};
  }

  /** The next T ids → logits of the token after them (vocab_size). features: from `see`, of each picture that begins in
   * them. seen: a list, to which each layer appends the attention of the last token (S). */
  forward(ids, features, cache, seen = null) {
    const {decoder} = this.config, w = this.weights, D = decoder.hidden_size, T = ids.length, past = cache.ids.length;
    const limit = decoder.max_position_embeddings, unknown = ids.find((id) => !(id >= 0 && id < decoder.vocab_size));
    if (unknown !== undefined) throw new Error(`The model has no token ${unknown}. Its tokenizer is a different one.`);
    if (past + T > limit) throw new Error(`${past + T} tokens are more than the model reads: ${limit}. Start a new chat.`);
    let h = new Float32Array(T * D);
    ids.forEach((id, t) => h.set(w.read("model.embed_tokens.weight", id, 1), t * D));
    const begins = this.findPictures(ids);
    if (begins.length !== features.length) {
      throw new Error(`The text has places for ${begins.length}, but there are ${features.length} pictures.`);
    }
    begins.forEach((t, i) => h.set(this.project(features[i]), t * D)); // for the decoder these are P ordinary tokens
    const norm = (x, name) => rmsNorm(x, w.vector(`${name}.weight`), decoder.rms_norm_eps);
    for (let i = 0; i < decoder.num_hidden_layers; i++) {
      const layer = `model.layers.${i}`;
      add(h, this.attention(`${layer}.self_attn`, norm(h, `${layer}.input_layernorm`), cache.layers[i], past, seen));
      if (i + 1 === decoder.num_hidden_layers) h = h.subarray((T - 1) * D); // only the last token needs logits
      const normed = norm(h, `${layer}.post_attention_layernorm`);
      add(h, decoder.use_moe ? this.experts(`${layer}.mlp`, normed) : this.feedForward(`${layer}.mlp`, normed));
    }
    cache.ids.push(...ids);
    return w.linear("model.embed_tokens", norm(h, "model.norm")); // the head is the same matrix
  }

  /** x (T, D) → (T, D); appends keys and values to the layer's cache. */
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

  /** RoPE: rotates entries i and i + d/2 of each head of x (T, heads·d) by position · theta^(-2i/d), in place. */
  rotate(x, heads, d, past) {
    const theta = this.config.decoder.rope_theta;
    for (let i = 0; i < d / 2; i++) {
      const frequency = Math.fround(1 / Math.fround(theta ** Math.fround((2 * i) / d))); // as precise as PyTorch
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

  /** Sends each token through the k of E feed-forwards that the gate chooses, and the shared ones: (T, D) → (T, D). */
  experts(name, x) {
    const {n_routed_experts: E, num_experts_per_tok: k, n_shared_experts: shared, normed} = this.config.decoder;
    const D = this.config.decoder.hidden_size;
    const scores = this.weights.linear(`${name}.gate`, x), y = new Float32Array(x.length); // (T, E)
    const turns = Array.from({length: E}, () => []); // of each expert: [token, its weight]
    for (let t = 0; t * D < x.length; t++) {
      const row = softmax(scores.subarray(t * E, (t + 1) * E));
      const chosen = Array.from(row.keys()).sort((a, b) => row[b] - row[a]).slice(0, k);
      const sum = normed ? chosen.reduce((total, expert) => total + row[expert], 1e-20) : 1;
      for (const expert of chosen) turns[expert].push([t, row[expert] / sum]);
    }
    turns.forEach((tokens, expert) => {
      if (!tokens.length) return;
      const rows = new Float32Array(tokens.length * D);
      tokens.forEach(([t], i) => rows.set(x.subarray(t * D, (t + 1) * D), i * D));
      const out = this.feedForward(`${name}.experts.${expert}`, rows);
      tokens.forEach(([t, weight], i) => {
        for (let j = 0; j < D; j++) y[t * D + j] += weight * out[i * D + j];
      });
    });
    for (let i = 0; i < shared; i++) add(y, this.feedForward(`${name}.shared_experts.${i}`, x));
    return y;
  }

  // -------------------------------------------------------------------------- a chat

  /** A question of the page with a tag for each of its pictures, like `user_turn` in inference/generate.py. */
  userTurn(text, pictures) {
    const {tag, pictures_first: first} = this.config.chat, tags = text.split(tag).length - 1;
    if (tags && tags !== pictures) throw new Error(`The text has ${tags} ${tag}, but there are ${pictures} pictures.`);
    if (tags || !pictures) return text;
    return first || pictures > 1 ? `${tag}\n`.repeat(pictures) + text : `${text}\n${tag}`;
  }

  /** [{role, content}] with "<image>" in user turns → {ids, pictures}, as `encode_chat` in model/processing.py: special
   * tokens in user text are plain text; after a last turn of the user the ids end where the answer begins. */
  encodeChat(turns, tokenizer) {
    const {placeholder, P} = this.config.decoder, {tag, system, no_thought: noThought} = this.config.chat;
    const [start, end] = [tokenizer.ids.get("<|im_start|>"), tokenizer.ids.get("<|im_end|>")];
    const sign = tokenizer.tokens[placeholder], run = sign.repeat(P), typed = sign.length === 1; // "@": people type it
    const text = (string) => tokenizer.encode(string), image = Array(P).fill(placeholder), ids = [];
    if (system && turns[0]?.role !== "system") turns = [{role: "system", content: system}, ...turns];
    let pictures = 0;
    for (const {role, content} of turns) {
      let parts = role === "user" ? content.split(tag) : [content];
      pictures += parts.length - 1;
      if (typed && parts.join(run).split(run).length !== parts.length) {
        throw new Error(`The text has ${P} or more ${sign} in a row, like a picture. Shorten the run.`);
      }
      if (role === "assistant") {
        ids.push(...text(noThought ? afterThoughts(content) : content), end, ...text("\n"));
        continue;
      }
      if (typed) parts = [parts.join(run)]; // else <|image_pad|>, inserted as ids
      const pieces = parts.map((part, i) => (i ? [...image, ...text(part)] : text(`${role}\n${part}`)));
      ids.push(start, ...pieces.flat(), end, ...text("\n"));
      if (role === "user") ids.push(start, ...text("assistant\n"));
    }
    if (noThought && turns.at(-1)?.role === "user") ids.push(...text(noThought));
    return {ids, pictures};
  }

  /** Yields the tokens of an answer one by one, until <|im_end|> or max_new_tokens. */
  *generate(ids, features, cache, {max_new_tokens, random = Math.random, ...sampling}) {
    let logits = this.forward(ids, features, cache);
    for (let n = 1; ; n++) {
      const token = this.sample(logits, sampling, random);
      yield token;
      if (n >= max_new_tokens || token === this.config.decoder.eos_token_id) return;
      logits = this.forward([token], [], cache); // everything before is in the cache
    }
  }

  /** Samples a token: the most likely at temperature 0, else one of the most likely that make up the share top_p. */
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

/** Returns an answer in the format that MiniMind-3 was trained on: after a thought, which is usually empty. */
function afterThoughts(content) {
  const cut = content.lastIndexOf("</think>"), said = cut < 0 ? content : content.slice(cut + 8);
  const thought = content.slice(0, Math.max(cut, 0)).split("</think>")[0].split("<think>").at(-1);
  return `<think>\n${thought.replace(/^\n+|\n+$/g, "")}\n</think>\n\n${said.replace(/^\n+/, "")}`;
}

/** Returns an answer without the <think> block that MiniMind-3 may write first. */
function withoutThoughts(text) {
  return text.replace(/<think>[^]*?(<\/think>|$)/g, "").trim();
}
