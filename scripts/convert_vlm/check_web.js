"use strict";
// What a page made by `--to web` answers, without a browser: node check_web.js FOLDER QUESTIONS [--plain]
//
// QUESTIONS: JSON, [{turns, pictures: [{rgba: base64, width, height}], max_new_tokens}]. Written as JSON: for each ids,
// pixels and features of the pictures, logits after the prompt (base64 of bytes and floats), answer ids, text. --plain:
// without the kernel.

const fs = require("fs"), path = require("path"), vm = require("vm");
const [folder, questions, plain] = process.argv.slice(2);
const page = fs.readFileSync(path.join(folder, "chat.html"), "utf8");
const scripts = (mark) => page.matchAll(new RegExp(`<script[^>]* ${mark}[^>]*>([^]*?)</script>`, "g"));
const read = (id) => scripts(`id="${id}"`).next().value[1];
const bytesOf = (text) => Uint8Array.from(Buffer.from(text, "base64"));
const base64 = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString("base64");

vm.runInThisContext(read("engine"), "engine"); // classes and functions are then as in the page's worker
const config = JSON.parse(read("config")), tokenizer = new Tokenizer(JSON.parse(read("tokenizer")));
const files = config.files?.map(({name}) => fs.readFileSync(path.join(folder, name)));
const weights = Buffer.concat(files ?? Array.from(scripts('class="weights"'), ([, text]) => bytesOf(text)));

(async () => {
  const began = performance.now();
  const kernel = plain ? null : bytesOf(read("kernel")), memory = memoryFor(weights.length, kernel);
  new Uint8Array(memory.buffer).set(weights);
  const model = new MiniMindV(config, new Weights(memory, kernel));
  const loaded = (performance.now() - began) / 1000, answers = [];
  for (const {turns, pictures, max_new_tokens} of JSON.parse(fs.readFileSync(questions, "utf8"))) {
    const {ids} = model.encodeChat(turns, tokenizer), begun = performance.now();
    const seen = ({rgba, width, height}) => resize(linesIn(bytesOf(rgba), width), width, height, config.processor);
    const pixels = pictures.map(seen);
    const features = pixels.map((each) => model.see(each)), saw = performance.now();
    const logits = model.forward(ids, features, model.newCache()), read = performance.now();
    const answer = [...model.generate(ids, features, model.newCache(), {max_new_tokens, temperature: 0})];
    const text = tokenizer.decode(answer), end = performance.now();
    const seconds = {see: (saw - begun) / 1000, prefill: (read - saw) / 1000, answer: (end - read) / 1000};
    const arrays = {pixels: pixels.map(base64), features: features.map(base64), logits: base64(logits)};
    answers.push({ids, ...arrays, answer, text, seconds});
  }
  process.stdout.write(JSON.stringify({loaded, answers}));
})();
