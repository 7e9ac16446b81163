"use strict";
// The model at work, beside the page, which stays awake: what it is asked comes as messages, and answers stream back.
//
//     load {config, tokenizer, kernel, urls: [{url, bytes}]} → progress {share} ..., ready {seconds}
//     part {bytes: Uint8Array} ... → the same: the weights after `load`, where there are no urls
//     ask {turns, pictures, temperature, top_p, max_new_tokens} → text {text} ..., done {text, words, why, tokens, ...}
//     look {token} → attention {token, word, side, maps}: where the decoder looked when it chose this word
//     stop, clear → nothing; whatever goes wrong → error {message}, a sentence
//
// turns: [{role, content, pictures}] with how many pictures each has; or they stand in content as <image>. pictures:
// those of the whole chat, {id, blob} or {id, rgba, width, height}, or {id} of one that was among `kept`, which comes
// with done. words: [{text, begin, end, tokens}], the places of their tokens. why: end, length or stopped. forgotten:
// how many of the first questions were left out, as the chat is too long.

let model = null, tokenizer = null, cache = null;
let coming = null; // the model before it is whole: {config, kernel, memory, at, began}
let seen = []; // pictures of the chat: {id, pixels, features}
let answer = {start: 0, ids: []}; // the last one, and where in the cache it begins
let stopped = false, work = Promise.resolve();
const MOST_TOKENS = 1536; // of a chat, as --max_seq_len of web_demo_vlm.py: more takes seconds to read

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

/** Until the messages that wait are read. */
const pause = () => new Promise((resolve) => {
  const {port1, port2} = new MessageChannel();
  port1.onmessage = () => resolve(port1.close());
  port2.postMessage(null);
});

function sentence(error) {
  const full = /memory|allocat|array.*length|call stack/i.test(error.message); // each browser has its own words
  if (!full) return error.message;
  return "This device has too little free memory. Close other pages, or take fewer and smaller pictures.";
}

// ---------------------------------------------------------------------------- the model comes

async function load({config, tokenizer: json, kernel = null, urls}) {
  tokenizer = new Tokenizer(json);
  coming = {config, kernel, memory: memoryFor(config.bytes, kernel), at: 0, began: performance.now()};
  if (urls) await fetchAll(urls);
}

/** Goes to its place at once: a second copy of the weights would be what a phone has no memory for. */
function part({bytes}) {
  if (!coming) return; // there was no room for them, which was said
  const {config, kernel, memory, began} = coming;
  new Uint8Array(memory.buffer).set(bytes, coming.at);
  coming.at += bytes.length;
  if (!config.files) bytes.buffer.transfer?.(0); // is free now, not when the browser looks for garbage
  post("progress", {share: coming.at / config.bytes});
  if (coming.at < config.bytes) return;
  model = new MiniMindV(config, new Weights(memory, kernel));
  clear();
  post("ready", {seconds: (performance.now() - began) / 1000});
}

/** The files of weights, one after the other. They come by way of those that the browser keeps for the next time, as
 * what is on its way there takes no memory here. */
async function fetchAll(urls) {
  const kept = await globalThis.caches?.open("minimind-v").catch(() => null); // none without https
  for (const {url, bytes: length} of urls) {
    if (kept && !(await kept.match(url))) await kept.add(url).catch(() => {}); // or the disk is full
    const known = await kept?.match(url);
    const response = known ?? (await fetch(url).catch(() => ({ok: false, status: "no network"})));
    if (!response.ok) throw new Error(`${url} cannot be fetched (${response.status}). Load the page again.`);
    const bytes = new Uint8Array(await response.arrayBuffer().catch(() => new ArrayBuffer(0)));
    if (bytes.length !== length) {
      await kept?.delete(url);
      const what = bytes.length > length ? "is longer than it was" : "came in part only";
      throw new Error(`${url} ${what}. Load the page again.`);
    }
    part({bytes});
  }
}

// ---------------------------------------------------------------------------- questions

function clear() {
  [cache, seen, answer] = [model.newCache(), [], {start: 0, ids: []}];
}

const equal = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

/** What the encoder sees of a picture. */
async function read({blob, rgba, width, height}) {
  const {processor} = model.config;
  if (rgba) return resize(linesIn(rgba, width), width, height, processor);
  if (!blob) throw new Error("A picture is not kept any more. Ask again.");
  const bitmap = await decode(blob).catch(() => {
    throw new Error("A picture cannot be read any more, or is too large. Add it again, or a smaller one.");
  });
  const pixels = resize(linesOf(bitmap), bitmap.width, bitmap.height, processor);
  bitmap.close(); // its memory goes now, not some time
  return pixels;
}

async function ask({turns, pictures, temperature, top_p, max_new_tokens}) {
  const began = performance.now();
  stopped = false;
  turns = turns.map(({role, content, pictures: n = 0}) => ({role, content: n ? model.userTurn(content, n) : content}));
  let {ids, pictures: places} = model.encodeChat(turns, tokenizer), forgotten = 0;
  if (places !== pictures.length) {
    throw new Error(`The text has places for ${places}, and there are ${pictures.length} pictures.`);
  }
  const most = model.config.decoder.max_position_embeddings;
  const limit = Math.min(MOST_TOKENS, Math.max(most - max_new_tokens, most / 2)); // the answer needs room, too
  const second = () => turns.findIndex(({role}, i) => i > 0 && role === "user");
  for (; ids.length > limit && second() > 0; forgotten++) { // as `truncate` in inference/chat.py
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
  // What is as in the turn before is in the cache already; the last token is asked again, as its logits are wanted.
  let same = 0;
  while (same < ids.length - 1 && ids[same] === cache.ids[same]) same++;
  const begins = model.findPictures(ids), {P} = model.config.decoder;
  const half = (begin) => begin < same && same < begin + P; // no picture is in it in part
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

// ---------------------------------------------------------------------------- where it looked

// Where a word begins: at a Chinese character, after a space, and where Chinese goes over into letters.
const BEGIN = /[\u3400-\u9fff]|(?<!\S)\S|(?<=[\u3000-\u9fff\uff00-\uffef])(?![\u3400-\u9fff])[\p{L}\p{N}_]/gu;

/** The words of the last answer: where in what is shown, and the places of their tokens. */
function wordsOf(text) {
  const starts = Array.from(text.matchAll(BEGIN), (match) => match.index);
  const decoder = new Decoder(tokenizer), words = [];
  let waiting = [], begin = 0;
  answer.ids.forEach((id, i) => {
    const end = begin + decoder.add([id]).length; // a character is there when the last of its tokens is
    waiting.push(i);
    if (end === begin) return;
    const begins = starts.some((start) => begin <= start && start < end);
    if (!words.length || begins) words.push({begin, end, tokens: []});
    words.at(-1).end = end;
    words.at(-1).tokens.push(...waiting);
    [waiting, begin] = [[], end];
  });
  const before = text.indexOf(withoutThoughts(text)); // blanks and thoughts, which are not shown
  return words.map(({begin, end, tokens}) => {
    const word = text.slice(begin, end), left = word.length - word.trimStart().length;
    return {text: word.trim(), begin: begin + left - before, end: begin + word.trimEnd().length - before, tokens};
  }).filter((word) => word.text && word.begin >= 0);
}

/** token: a place in the last answer. For each picture a map (side, side), mean over layers, heads and the tokens of
 * the word; they are computed again, as what the decoder looks at is not kept. */
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
