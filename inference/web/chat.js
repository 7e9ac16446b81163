"use strict";
// A conversation with the model in worker.js: questions go there, answers come back word by word.

const MOST_PICTURES = 4; // per question, as in web_demo_vlm.py
const log = by("log"), box = by("text"), hello = by("hello"), onTouch = matchMedia("(pointer: coarse)").matches;

// ---------------------------------------------------------------------------- conversation

let turns = [], answering = null, ready = false; // answering: the turn that is being answered
let afterwards = null; // what to do after the answer

function newTurn(text, files) {
  const pictures = files.map(shown), turn = {text, files, read: [], words: [], answer: ""};
  const onWord = ({target: {dataset}}) => dataset.word && look(turn, Number(dataset.word));
  turn.said = make("p", {className: "answer", role: "group", label: "answer", onclick: onWord});
  turn.figure = make("figure", {className: "card", hidden: true});
  turn.about = make("div", {className: "about"});
  const question = {className: "asked", role: "group", label: "question"};
  const asked = make("div", question, ...pictures, make("p", {textContent: text}));
  turn.view = make("article", {className: "turn"}, asked, turn.said, turn.figure, turn.about);
  turns.forEach(closeLook);
  turns.push(turn);
  log.append(turn.view);
  return turn;
}

/** Returns the conversation as the model reads it, and its pictures. turns: answered ones, and the one to answer. Puts
 * tags where `user_turn` of inference/generate.py puts them. */
function chatOf(turns) {
  const messages = turns.flatMap(({text, files: {length}, answer}) => {
    const tags = Array(length).fill("<image>").join("\n"), first = config.chat.pictures_first || length > 1;
    const content = !length || text.includes("<image>") ? text : first ? `${tags}\n${text}` : `${text}\n${tags}`;
    return [{role: "user", content}, {role: "assistant", content: answer}];
  });
  return [messages.slice(0, -1), turns.flatMap(({files}) => files)];
}

function send() {
  if (!ready || answering) return;
  if ((andSend = coming > 0)) return; // a large picture takes a second to add
  const text = box.value.trim(), files = waiting, n = files.length, tags = text.split("<image>").length - 1;
  const refused = n > MOST_PICTURES ? "many" : tags && tags !== n ? "tags" : text || n ? "" : "empty";
  tell(by("told"), refused, {n, limit: MOST_PICTURES});
  if (refused) return;
  waiting = [];
  showWaiting();
  write("");
  ask(newTurn(text || promptsOf(n > 1)[0], files));
}

function ask(turn) {
  Object.assign(turn, {answer: "", failed: false, words: []});
  turn.said.textContent = "";
  turn.about.replaceChildren();
  closeLook(turn);
  work(turn);
  log.scrollTop = log.scrollHeight;
  const [messages, files] = chatOf(turns.filter((each) => each === turn || (each.answer && !each.failed)));
  const [temperature, top_p, max_new_tokens] = ["temperature", "top_p", "length"].map((id) => Number(by(id).value));
  const pictures = files.map(({id, blob}) => (kept.includes(id) ? {id} : {id, blob}));
  turn.read = files;
  worker.postMessage({type: "ask", turns: messages, pictures, temperature, top_p, max_new_tokens});
}

/** Marks a turn as being answered; null: none is. */
function work(turn) {
  answering?.view.classList.remove("busy");
  turn?.view.classList.add("busy");
  answering = turn;
  by("send").disabled = !ready;
  by("send").hidden = Boolean(turn);
  by("stop").hidden = !turn;
  if (turn) return;
  if (!onTouch && document.activeElement === document.body) box.focus(); // the button that had the focus is hidden
  const next = afterwards;
  afterwards = null;
  next?.();
}

function stop() {
  if (answering) worker.postMessage({type: "stop"});
}

function clear() {
  if (answering) return (afterwards = clear), stop();
  [turns, waiting] = [[], []];
  kept = [];
  andSend = false;
  if (ready) worker.postMessage({type: "clear"});
  log.replaceChildren(hello);
  tell(by("told"), "");
  showWaiting();
}

/** Fills the line below an answer: phrases and their values. */
function showAbout(turn, phrases, values) {
  const className = turn.failed ? "notice" : "", canLook = turn.words.length > 0 && turn.read.length > 0;
  const lines = phrases.map((say) => make("span", {say, values, className}));
  const where = canLook ? [make("button", {say: "look", onclick: () => look(turn, 0)})] : [];
  const retry = make("button", {say: "retry", className: "retry", onclick: () => answering || ask(turn)});
  turn.view.classList.toggle("can-look", canLook);
  turn.about.replaceChildren(...lines, ...where, retry);
}

function showWords(turn) {
  let place = 0;
  const parts = turn.words.flatMap(({begin, end}, n) => {
    const span = make("span", {textContent: turn.answer.slice(begin, end)}), before = turn.answer.slice(place, begin);
    span.dataset.word = n;
    place = end;
    return [before, span];
  });
  turn.said.replaceChildren(...parts, turn.answer.slice(place));
}

/** Calls `what`, which makes the conversation longer; a view of its end keeps showing the end. */
function growing(what) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  what();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

const heard = { // what to do on messages from the worker
  progress: ({share}) => progress(share),
  ready() {
    ready = true;
    by("loading").hidden = true;
    tell(by("loaded"), "loaded", {name: config.name, seconds: (performance.now() / 1000).toFixed(1)});
    work(null);
  },
  text: ({text}) => growing(() => (answering.said.textContent = answering.answer = text)),
  done({text, words, tokens, seconds, firstSeconds, why, forgotten, kept: ids}) {
    const turn = Object.assign(answering, {answer: text, words}), first = firstSeconds ?? seconds;
    kept = ids;
    if (forgotten) turn.read = turn.read.filter(({id}) => ids.includes(id));
    const [n, time] = tokens > 1 ? [tokens - 1, seconds - first] : [tokens, seconds]; // the first token is slow
    const inMs = (seconds) => Math.round(1000 * seconds), rate = Math.round(n / Math.max(time, 1e-3));
    const figures = {tokens, rate, first: inMs(first), ms: inMs(seconds), forgotten};
    const unseen = config.needs_picture && !turn.read.length && "unseen";
    const notes = [{stopped: "stopped", length: "cut"}[why], forgotten && "forgotten", unseen];
    growing(() => (showWords(turn), showAbout(turn, ["took", "times", ...notes.filter(Boolean)], figures)));
    by("answered").textContent = text; // read aloud once it is complete
    work(null);
  },
  attention: (message) => answering || (turns.length && showLook(turns.at(-1), message)),
  error(error) {
    const turn = answering, [key, values] = meaning(error);
    by("loading").hidden = true;
    if (!turn) return tell(by("told"), key, values);
    turn.failed = true;
    kept = [];
    growing(() => showAbout(turn, [key], values));
    by("answered").textContent = phrase(key, values);
    work(null);
  },
};

// ---------------------------------------------------------------------------- input

function write(text) {
  box.value = text;
  if (!onTouch) box.focus(); // on a touch screen the keyboard would hide half of the page
}

by("ask").onsubmit = (event) => (event.preventDefault(), send());
by("stop").onclick = stop;
by("clear").onclick = () => (clear(), write(""));
by("language").onclick = () => ((language = language === "en" ? "zh" : "en"), translate());
by("adjust").onclick = () => by("adjust").setAttribute("aria-expanded", !by("settings").toggleAttribute("hidden"));
by("photo").hidden = !onTouch; // without a touch screen it would only choose a file
if (onTouch) hello.lastChild.dataset.say = "how_touch";
for (const [button, input] of [["choose", "files"], ["photo", "camera"]]) {
  by(button).onclick = () => by(input).click();
  by(input).onchange = ({target}) => add([...target.files]).then(() => (target.value = ""));
}
document.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return; // an input method is active: the keys choose characters
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && event.target === box && !event.shiftKey) event.preventDefault(), send();
};
document.onpaste = ({clipboardData: {files}}) => add([...files]);
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    if (type !== "dragleave") event.preventDefault(); // the browser would open the picture
    document.body.classList.toggle("over", type === "dragover");
    if (type === "drop") add([...event.dataTransfer.files]);
  });
}

// ---------------------------------------------------------------------------- loading the model

let config = {}, worker = null, samples = []; // samples: buttons of sample pictures
const inlined = (id) => by(id).textContent, progress = (share) => (document.querySelector("progress").value = share);
const bytesOf = (base64) => Uint8Array.fromBase64?.(base64) ?? Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

/** Moves the weights of this page to the worker part by part: as text in the page they would take more memory. */
async function handOver() {
  for (let script; (script = document.querySelector(".weights")); script.remove()) {
    const bytes = bytesOf(script.textContent);
    worker.postMessage({type: "part", bytes}, [bytes.buffer]);
    await new Promise((resolve) => setTimeout(resolve)); // lets the page show the progress
  }
}

async function start() {
  config = JSON.parse(inlined("config"));
  by("temperature").value = 0.65; // defaults as in web_demo_vlm.py
  by("top_p").value = 0.85;
  by("length").value = 512;
  for (const input of document.querySelectorAll("#settings input")) {
    (input.oninput = () => (input.previousElementSibling.textContent = input.value))();
  }
  samples = (config.samples ?? []).map((src, n) => {
    const button = {className: "picture", onclick: () => add([new Blob([bytesOf(src.split(",")[1])])])};
    return make("button", {...button, label: "sample", values: {n: n + 1}}, make("img", {src, alt: ""}));
  });
  translate();
  if (!onTouch) box.focus();
  worker = new Worker(URL.createObjectURL(new Blob([inlined("engine")], {type: "text/javascript"})));
  worker.onmessage = ({data}) => heard[data.type](data);
  worker.onerror = (event) => (event.preventDefault(), heard.error(event));
  const urls = config.files?.map(({name, bytes}) => ({url: new URL(name, location).href, bytes}));
  const tokenizer = JSON.parse(inlined("tokenizer")), kernel = bytesOf(inlined("kernel"));
  worker.postMessage({type: "load", config, tokenizer, kernel, urls});
  if (!urls) await handOver();
}
start().catch((error) => heard.error(error));
