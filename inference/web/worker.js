"use strict";
// Runs the model in a worker, so that the page stays responsive. Questions come as messages, answers stream back.
//
//     load {config, tokenizer, kernel, urls: [{url, bytes}]} → progress {share} ..., ready {seconds}
//     part {bytes: Uint8Array} ... → the same: the weights, sent after `load` if it has no urls
//     ask {turns, pictures, temperature, top_p, max_new_tokens} → text {text} ..., done {text, words, why, tokens, ...}
//     look {token} → attention {token, word, side, maps}: where the decoder looked when it chose this word
//     stop, clear → no reply; any error → error {message}, a sentence
//
// turns: [{role, content, pictures}]; pictures is their number, 0 if content has <image> tags. pictures: those of the
// whole chat, {id, blob} or {id, rgba, width, height}, or {id} alone if the last `done` listed it in `kept`. words:
// [{text, begin, end, tokens}], with the indices of their tokens. why: end, length or stopped. forgotten: how many of
// the first questions were left out because the chat is too long.

let model = null, tokenizer = null, cache = null;
let coming = null; // the model while it loads: {config, kernel, memory, at, began}
let seen = []; // pictures of the chat: {id, pixels, features}
let answer = {start: 0, ids: []}; // the last answer, and where in the cache it begins
let stopped = false, work = Promise.resolve();
const MOST_TOKENS = 1536; // of a chat, like --max_seq_len of web_demo_vlm.py: reading more takes seconds

const post = (type, facts) => postMessage({type, ...facts});
const HANDLERS = {load, part, ask, look, clear};

globalThis.onmessage = ({data}) => {
  if (data.type === "stop" || data.type === "clear") stopped = true;
  if (data.type in HANDLERS) work = work.then(() => handle(data)); // one after the other
};

async function handle(data) {
  try {
    if (!model && !["load", "part"].includes(data.type)) throw new Error("The model is not loaded yet.");
    await HANDLERS[data.type](data);
  } catch (error) {
    post("error", {message: sentence(error)});
  }
}

/** Waits until pending messages are handled. */
const pause = () => new Promise((resolve) => {
  const {port1, port2} = new MessageChannel();
  port1.onmessage = () => resolve(port1.close());
  port2.postMessage(null);
});

function sentence(error) {
  const full = /memory|allocat|array.*length|call stack/i.test(error.message); // each browser words it differently
  if (!full) return error.message;
  return "This device has too little free memory. Close other pages, or use fewer or smaller pictures.";
}

// ---------------------------------------------------------------------------- loading the model

async function load({config, tokenizer: json, kernel = null, urls}) {
  tokenizer = new Tokenizer(json);
  coming = {config, kernel, memory: memoryFor(config.bytes, kernel), at: 0, began: performance.now()};
  if (urls) await fetchAll(urls);
}

/** Copies a part of the weights to its place at once: a phone has no memory for a second copy of them. */
function part({bytes}) {
  if (!coming) return; // there was no memory for them, which was reported
  const {config, kernel, memory, began} = coming;
  new Uint8Array(memory.buffer).set(bytes, coming.at);
  coming.at += bytes.length;
  if (!config.files) bytes.buffer.transfer?.(0); // freed now, not at the next garbage collection
  post("progress", {share: coming.at / config.bytes});
  if (coming.at < config.bytes) return;
  model = new MiniMindV(config, new Weights(memory, kernel));
  clear();
  post("ready", {seconds: (performance.now() - began) / 1000});
}

/** Fetches the files of the weights one after the other, by way of the browser's cache for the next visit: a download
 * into the cache takes no memory here. */
async function fetchAll(urls) {
  const kept = await globalThis.caches?.open("minimind-v").catch(() => null); // not without https
  for (const {url, bytes: length} of urls) {
    if (kept && !(await kept.match(url))) await kept.add(url).catch(() => {}); // e.g. a full disk
    const known = await kept?.match(url);
    const response = known ?? (await fetch(url).catch(() => ({ok: false, status: "no network"})));
    if (!response.ok) throw new Error(`${url} cannot be fetched (${response.status}). Reload the page.`);
    const bytes = new Uint8Array(await response.arrayBuffer().catch(() => new ArrayBuffer(0)));
    if (bytes.length !== length) {
      await kept?.delete(url);
      const what = bytes.length > length ? "is longer than expected" : "came in part only";
      throw new Error(`${url} ${what}. Reload the page.`);
    }
    part({bytes});
  }
}

// ---------------------------------------------------------------------------- questions

function clear() {
  [cache, seen, answer] = [model.newCache(), [], {start: 0, ids: []}];
}

const equal = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

/** Returns the pixels of a picture that the encoder sees. */
async function read({blob, rgba, width, height}) {
  const {processor} = model.config;
  if (rgba) return resize(linesIn(rgba, width), width, height, processor);
  if (!blob) throw new Error("A picture is no longer available. Ask again.");
  const bitmap = await decode(blob).catch(() => {
    throw new Error("A picture can no longer be read, or is too large. Add it again, or add a smaller one.");
  });
  const pixels = resize(linesOf(bitmap), bitmap.width, bitmap.height, processor);
  bitmap.close(); // frees its memory now
  return pixels;
}

async function ask({turns, pictures, temperature, top_p, max_new_tokens}) {
  const began = performance.now();
  stopped = false;
  turns = turns.map(({role, content, pictures: n = 0}) => ({role, content: n ? model.userTurn(content, n) : content}));
  let {ids, pictures: places} = model.encodeChat(turns, tokenizer), forgotten = 0;
  if (places !== pictures.length) {
    throw new Error(`The text has places for ${places}, but there are ${pictures.length} pictures.`);
  }
  const most = model.config.decoder.max_position_embeddings;
  const limit = Math.min(MOST_TOKENS, Math.max(most - max_new_tokens, most / 2)); // the answer needs room too
  const second = () => turns.findIndex(({role}, i) => i > 0 && role === "user");
  for (; ids.length > limit && second() > 0; forgotten++) { // like `truncate` in inference/chat.py
    turns = turns.slice(second());
    ({ids, pictures: places} = model.encodeChat(turns, tokenizer));
    pictures = pictures.slice(pictures.length - places);
  }
  const room = most - ids.length;
  if (room < 1) throw new Error(`The question is longer than the model can read: ${ids.length} tokens of ${most - 1}.`);
  const shown = [], took = () => (performance.now() - began) / 1000;
  for (const {id = null, ...file} of pictures) {
    const before = id !== null && seen.find((picture) => picture.id === id);
    const pixels = before ? before.pixels : await read(file);
    const known = before || seen.find((picture) => equal(picture.pixels, pixels));
    shown.push(known ? {...known, id} : {id, pixels, features: model.see(pixels)});
    await pause();
    const none = {text: "", words: [], tokens: 0, firstSeconds: null, kept: seen.map((picture) => picture.id)};
    if (stopped) return post("done", {...none, why: "stopped", forgotten, seconds: took()});
  }
  // What the last turn has in common is in the cache already. The last token is computed again for its logits.
  let same = 0;
  while (same < ids.length - 1 && ids[same] === cache.ids[same]) same++;
  const begins = model.findPictures(ids), {P} = model.config.decoder;
  const half = (begin) => begin < same && same < begin + P; // the cache must not end inside a picture
  const other = begins.findIndex((begin, i) => shown[i].features !== seen[i]?.features || half(begin));
  if (other >= 0) same = Math.min(same, begins[other]);
  cache.ids.length = same;
  seen = shown;
  answer = {start: ids.length, ids: []};
  const features = shown.slice(begins.filter((begin) => begin < same).length).map((picture) => picture.features);
  const decoder = new Decoder(tokenizer);
  let text = "", firstSeconds = null, told = 0;
  const settings = {temperature, top_p, max_new_tokens: Math.min(max_new_tokens, room)};
  for (const token of model.generate(ids.slice(same), features, cache, settings)) {
    answer.ids.push(token);
    text += decoder.add([token]);
    firstSeconds ??= took();
    if (performance.now() - told > 30) {
      post("text", {text: withoutThoughts(text)});
      await pause();
      told = performance.now();
    }
    if (stopped) break;
  }
  text += decoder.end();
  const ended = answer.ids.at(-1) === model.config.decoder.eos_token_id;
  const kept = seen.map((picture) => picture.id);
  const facts = {tokens: answer.ids.length, seconds: took(), firstSeconds, forgotten, kept};
  const why = ended ? "end" : stopped ? "stopped" : "length";
  answer.words = wordsOf(text);
  post("done", {text: withoutThoughts(text), words: answer.words, why, ...facts});
}

// ---------------------------------------------------------------------------- attention

// A word begins at a Chinese character, after a space, and where letters follow Chinese.
const BEGIN = /[\u3400-\u9fff]|(?<!\S)\S|(?<=[\u3000-\u9fff\uff00-\uffef])(?![\u3400-\u9fff])[\p{L}\p{N}_]/gu;

/** Returns the words of the last answer: their positions in the text that is shown, and the indices of their tokens. */
function wordsOf(text) {
  const starts = Array.from(text.matchAll(BEGIN), (match) => match.index);
  const decoder = new Decoder(tokenizer), words = [];
  let waiting = [], begin = 0;
  answer.ids.forEach((id, i) => {
    const end = begin + decoder.add([id]).length; // a character is complete with its last token
    waiting.push(i);
    if (end === begin) return;
    const begins = starts.some((start) => begin <= start && start < end);
    if (!words.length || begins) words.push({begin, end, tokens: []});
    words.at(-1).end = end;
    words.at(-1).tokens.push(...waiting);
    [waiting, begin] = [[], end];
  });
  const before = text.indexOf(withoutThoughts(text)); // length of blanks and thoughts, which are not shown
  return words.map(({begin, end, tokens}) => {
    const word = text.slice(begin, end), left = word.length - word.trimStart().length;
    return {text: word.trim(), begin: begin + left - before, end: begin + word.trimEnd().length - before, tokens};
  }).filter((word) => word.text && word.begin >= 0);
}

/** Posts where the decoder looked for the word at index `token` of the last answer: for each picture a map (side,
 * side), mean over layers, heads and the tokens of the word. Computes it again, because attention is not stored. */
function look({token}) {
  const word = answer.words?.find(({tokens}) => tokens.includes(token));
  if (!word) throw new Error(`The answer has no word at token ${token}.`);
  const whole = [...cache.ids, ...answer.ids.slice(cache.ids.length - answer.start)], kept = cache.ids.length;
  const {P} = model.config.decoder, side = Math.floor(Math.sqrt(P)); // registers come before the patches
  const begins = model.findPictures(whole.slice(0, answer.start)).map((begin) => begin + P - side * side);
  const maps = begins.map(() => new Float32Array(side * side));
  for (const place of word.tokens) {
    const at = answer.start + place - 1, layers = []; // a token is chosen at the position before it
    cache.ids.length = at;
    model.forward([whole[at]], [], cache, layers);
    for (const [n, begin] of begins.entries()) {
      for (const layer of layers) {
        for (let i = 0; i < side * side; i++) maps[n][i] += layer[begin + i] / layers.length / word.tokens.length;
      }
    }
  }
  cache.ids = whole.slice(0, kept);
  post("attention", {token, word, side, maps});
}
