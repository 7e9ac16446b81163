"use strict";
// Text ↔ tokens: byte-level BPE (Sennrich et al. 2016), like the library `tokenizers` with model/*/tokenizer.json.

// No token spans two pieces: contractions, words, numbers, punctuation, each with a space before it, other whitespace.
const [SPACE, WORDS] = ["\\p{White_Space}", " ?\\p{L}+| ?\\p{N}+"];
const PIECES = new RegExp(
  `'s|'t|'re|'ve|'m|'ll|'d|${WORDS}| ?[^${SPACE}\\p{L}\\p{N}]+|${SPACE}+(?!\\P{White_Space})|${SPACE}+`, "gu");

// A vocabulary is text, so each of the 256 bytes has a visible character: its own if it is visible, else one above 255.
const CHARACTER = [];
for (let byte = 0, next = 256; byte < 256; byte++) {
  const visible = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  CHARACTER.push(String.fromCharCode(visible ? byte : next++));
}
const BYTE = new Map(CHARACTER.map((character, byte) => [character, byte]));

class Tokenizer {
  /** json: the content of tokenizer.json. */
  constructor(json) {
    this.added = json.added_tokens;
    this.ids = new Map(Object.entries(json.model.vocab));
    for (const token of this.added) this.ids.set(token.content, token.id);
    this.tokens = [];
    for (const [token, id] of this.ids) this.tokens[id] = token;
    this.special = new Set(this.added.filter((token) => token.special).map((token) => token.id));
    this.ranks = new Map(json.model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
    this.known = new Map(); // pieces that occurred → their ids
  }

  /** Returns the ids of a text. specials: <|im_end|> is the token, not ten characters as in the text of users. */
  encode(text, specials = false) {
    if (/\p{Surrogate}/u.test(text)) throw new Error("The text contains half a character. Type it again.");
    const whole = this.added.filter((token) => specials || !token.special).map((token) => token.content);
    whole.sort((a, b) => b.length - a.length); // at the same place the longest one wins
    const split = new RegExp(`(${whole.map((token) => token.replace(/[$()*+.?[\\\]^{|}]/g, "\\$&")).join("|")})`, "u");
    const parts = whole.length ? text.split(split) : [text]; // text, token, text, token, ..., text
    const idsOf = (part) => (part.match(PIECES) ?? []).flatMap((piece) => this.merge(piece));
    return parts.flatMap((part, i) => (i % 2 ? [this.ids.get(part)] : idsOf(part)));
  }

  /** A piece → ids: merges the pair of neighbours that was learned first, until no pair is in the vocabulary. */
  merge(piece) {
    if (this.known.has(piece)) return this.known.get(piece);
    let parts = Array.from(new TextEncoder().encode(piece), (byte) => CHARACTER[byte]);
    for (;;) {
      let first = Infinity;
      const ranks = parts.map((part, i) => this.ranks.get(`${part} ${parts[i + 1]}`) ?? Infinity);
      for (const rank of ranks) first = Math.min(first, rank);
      if (first === Infinity) break;
      const merged = [];
      for (let i = 0; i < parts.length; i++) merged.push(ranks[i] === first ? parts[i] + parts[++i] : parts[i]);
      parts = merged;
    }
    const ids = parts.map((part) => this.ids.get(part));
    if (piece.length < 50) this.known.set(piece, ids);
    return ids;
  }

  /** Returns the text of tokens, without special ones. */
  decode(ids) {
    const decoder = new Decoder(this);
    return decoder.add(ids) + decoder.end();
  }
}

class Decoder {
  /** Turns tokens into text as they come: a character that takes several tokens is complete with the last of them. */
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    this.bytes = new TextDecoder("utf-8", {ignoreBOM: true});
  }

  /** Returns the text that these ids add. */
  add(ids) {
    const bytes = [];
    for (const id of ids) {
      const token = this.tokenizer.tokens[id];
      if (token === undefined) throw new Error(`The tokenizer has no token ${id}. It belongs to another model.`);
      if (this.tokenizer.special.has(id)) continue;
      const mapped = Array.from(token, (character) => BYTE.get(character)); // undefined in tokens added as plain text
      bytes.push(...(mapped.includes(undefined) ? new TextEncoder().encode(token) : mapped));
    }
    return this.bytes.decode(new Uint8Array(bytes), {stream: true});
  }

  /** Returns what is left: a character that was never completed, as a question mark. */
  end() {
    return this.bytes.decode();
  }
}
